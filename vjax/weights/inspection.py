"""Whether a checkpoint can be served, and how large it is, from its config.json and the headers of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vjax.models.arch import ArchConfig
from vjax.models.hf_config import read_hf_config
from vjax.models.registry import arch_config_from_hf
from vjax.weights.checkpoint import Checkpoint
from vjax.weights.hub import ORBAX_FOLDER
from vjax.weights.manifest import Manifest, stored_format
from vjax.weights.mapping import as_stored, check_tensors, leaf_sources


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading it.

    Attributes:
        arch: Its architecture.
        dtype: Of the checkpoint's weights, as config.json says; float32 where it does not.
        num_parameters: Of all leaves.
        weights_checked: The files are there, and hold the tensors that the model needs, in the right shapes.
    """

    arch: ArchConfig
    dtype: str
    num_parameters: int
    weights_checked: bool

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Bytes of the weights on the device."""
        return self.num_parameters * itemsize

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that one token of context takes in the KV cache, where the head dim needs no padding."""
        return 2 * self.arch.num_layers * self.arch.num_kv_heads * self.arch.head_dim * itemsize


def inspect_model(model_dir: Path) -> ModelFacts:
    """Reads config.json and, where there are weights, the headers of their files or their manifest.

    Raises:
        ModelLoadError: The model is not supported, or its weights are not those that its config.json describes.
    """
    # Here, so that listing what is supported needs no JAX.
    import jax.numpy as jnp

    from vjax.models.functional import build_model

    config = read_hf_config(model_dir)
    arch = arch_config_from_hf(config)
    model = build_model(arch, jnp.bfloat16)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    is_orbax = stored_format(model_dir) == "orbax"
    # Of a hub id there may be the files that name the weights, but no weights.
    has_weights = any(model_dir.glob(f"{ORBAX_FOLDER}/*/" if is_orbax else "*.safetensors"))
    if has_weights and is_orbax:
        manifest = Manifest.read(model_dir)
        manifest.check(arch.architecture, shapes, str(model_dir))
        manifest.check_files(model_dir)
    elif has_weights:
        sources = leaf_sources(model.weight_rules, shapes, arch.num_layers)
        with Checkpoint(model_dir) as checkpoint:
            check_tensors(as_stored(sources, checkpoint.tensors), checkpoint.tensors, where=str(model_dir))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ModelFacts(arch, str(dtype), sum(map(math.prod, shapes.values())), has_weights)
