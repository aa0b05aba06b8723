"""The functional form: leaves, head, one lowering of the layer, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from vjax.models.arch import ArchConfig, RopeConfig
from vjax.models.decoder import AttentionMetadata
from vjax.models.functional import build_model
from vjax.models.registry import get_model_class
from vjax.parallel.sharding import AXIS_RULES, make_mesh, named_sharding


def arch(**changes) -> ArchConfig:
    fields = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "sliding_windows": (None,) * 4,
    }
    return ArchConfig(**{**fields, **changes})


def step_arguments(model, num_tokens: int):
    spec = jax.ShapeDtypeStruct
    config = model.arch
    cache = spec((5, config.num_kv_heads, 16, config.head_dim), model.dtype)
    tokens = spec((num_tokens,), jnp.int32)
    leaves = tuple(model.leaf_specs[name] for name in model.leaf_names)
    return leaves, tokens, ((cache, cache),) * config.num_layers, tokens, tokens


def step(model, num_tokens: int):
    def run(leaves, token_ids, kv, positions, slots):
        plan = pallas_kernels.plan_attention(
            jnp.zeros((2, 4), jnp.int32),
            jnp.ones((1,), jnp.int32),
            jnp.array([0, num_tokens], jnp.int32),
            jnp.array([num_tokens], jnp.int32),
            num_tokens=num_tokens,
            num_q_heads=model.arch.num_heads,
            num_kv_heads=model.arch.num_kv_heads,
            head_dim=model.arch.head_dim,
            block_size=16,
            dtype=model.dtype,
            decode_only=False,
            implementation="xla",
        )
        return model.forward(leaves, token_ids, kv, AttentionMetadata(positions, slots, plan))

    return run


def test_leaves():
    model = build_model(arch(), jnp.bfloat16)
    assert len(model.leaf_names) == 4 * 4 + 5
    specs = {name: spec.shape for name, spec in model.leaf_specs.items()}
    assert specs["layers.3.attention.qkv"] == (32, 2, 4, 16)
    assert specs["layers.0.attention.o"] == (2, 2, 16, 32)
    assert specs["layers.0.mlp.gate_up"] == (32, 2, 48)
    assert specs["vectors.attention_norm"] == (4, 32)
    assert all(spec.dtype == jnp.bfloat16 for spec in model.leaf_specs.values())
    assert model.initialisers["norm"] == "ones" and model.initialisers["embed"] == "normal"
    for name in model.leaf_names:
        axes = model.logical_axes[name]
        assert len(axes) == len(specs[name]) and all(axis in AXIS_RULES for axis in axes)


def test_the_order_of_leaves_is_that_of_the_modules_state():
    config = arch(qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    make = get_model_class(config)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    specs, treedef = jax.tree.flatten(state)
    model = build_model(config, jnp.float32)
    assert specs == [model.leaf_specs[name] for name in model.leaf_names]
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.standard_normal(spec.shape), jnp.float32) for spec in specs]
    module = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    hidden = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    expected = module.logits(module.final_norm(hidden))
    np.testing.assert_array_equal(model.logits(model.head_leaves(tuple(leaves)), hidden), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_head_leaves(tied):
    model = build_model(arch(tie_word_embeddings=tied), jnp.float32)
    assert model.head_leaf_names == ("norm", "embed" if tied else "lm_head")
    assert ("lm_head" in model.leaf_names) != tied
    head = tuple(jnp.ones(model.leaf_specs[name].shape) for name in model.head_leaf_names)
    logits = jax.jit(model.logits)(head, jnp.ones((3, 32)))
    assert logits.shape == (3, 64) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, 32.0, rtol=1e-4)


@pytest.mark.parametrize(("windows", "distinct"), [((None,) * 4, 1), ((None, 8, None, 8), 2)])
def test_equal_layers_are_lowered_once(windows, distinct):
    model = build_model(arch(sliding_windows=windows), jnp.float32)
    text = jax.jit(step(model, 8)).lower(*step_arguments(model, 8)).as_text()
    assert text.count("func.func private @_run_layer") == distinct
    assert text.count("call @_run_layer") == 4


def test_forward_shapes_and_dtypes():
    model = build_model(arch(), jnp.bfloat16)
    hidden, kv = jax.eval_shape(step(model, 8), *step_arguments(model, 8))
    assert hidden.shape == (8, 32) and hidden.dtype == jnp.bfloat16
    assert len(kv) == 4 and all(k.dtype == v.dtype == jnp.bfloat16 for k, v in kv)


def test_named_sharding_on_one_device():
    sharding = named_sharding(make_mesh(), ("vocab", "embed"))
    assert sharding.spec == jax.sharding.PartitionSpec("tp", None)
    assert len(sharding.device_set) == 1


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, jax.numpy as jnp; from vjax.models.registry import *; from vjax.models.functional import *; "
        "import vjax.weights.loader, vjax.weights.hub; "
        "[arch_config_from_hf({'architectures': [a], 'vocab_size': 8, 'hidden_size': 8, 'num_hidden_layers': 1, "
        "'num_attention_heads': 1, 'num_key_value_heads': 1, 'intermediate_size': 8, 'max_position_embeddings': 8}) "
        "for a in MODELS]; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_configuration_modules_do_not_import_jax():
    code = (
        "import sys; import vjax.models.arch, vjax.models.registry, vjax.models.hf_config, vjax.weights.hub, "
        "vjax.weights.mapping, vjax.weights.checkpoint; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
