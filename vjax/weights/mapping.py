"""Joins a model's weight rules with a checkpoint's tensor names and shapes. No jax, no tensor data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from vjax.errors import ModelLoadError
from vjax.models.weight_rules import WeightRule
from vjax.weights.packing import PACKERS, Shape

#: safetensors dtypes that are converted to the model's.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

#: Tensors that old exporters wrote and that are recomputed here, and scales of what is not quantised here: queries and
#: the weights of the softmax.
HARMLESS = re.compile(
    r".*\.rotary_emb\.inv_freq$|.*\.self_attn\.(attn\.)?(q_scale|prob_scale)$|.*\.q_proj\.(q_scale|output_scale)$"
)

#: Scales of a quantised KV cache, for keys, for values or for both; other caches pass over them.
KV_SCALE = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\."
    r"((attn\.|[kv]_proj\.)?(?P<which>[kv])_scale|(?P<proj>[kv])_proj\.output_scale|(attn\.)?(?P<both>kv_scale))$"
)

_PREFIX = "model."

#: Problems that one error message lists.
_MAX_LISTED = 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it."""

    shape: Shape
    #: As safetensors spells it, e.g. "BF16".
    dtype: str
    #: File that holds it, relative to the model directory.
    file: str = ""


@dataclass(frozen=True)
class LeafSources:
    """Where one leaf comes from."""

    leaf: str
    packing: str
    #: Tensor names in packing order: one tuple, or one per layer when the leaf stacks layers.
    groups: tuple[tuple[str, ...], ...]
    stacked: bool
    #: Expected shape of each tensor of a group.
    shapes: tuple[Shape, ...]
    #: Shape of the leaf, without the stacking axis.
    packed_shape: Shape


def leaf_sources(
    rules: Sequence[WeightRule], leaf_shapes: Mapping[str, Shape], num_layers: int
) -> dict[str, LeafSources]:
    """leaf name -> its sources, for every leaf of the model; rules for leaves that the model lacks are dropped."""
    found: dict[str, LeafSources] = {}
    for rule in rules:
        stacked = "{layer}" not in rule.leaf and any("{layer}" in source for source in rule.sources)
        layers = [str(layer) for layer in range(num_layers)]
        groups = [tuple(source.replace("{layer}", layer) for source in rule.sources) for layer in layers]
        if stacked:
            instances = {rule.leaf: tuple(groups)}
        elif "{layer}" in rule.leaf:
            instances = {rule.leaf.replace("{layer}", layer): (groups[int(layer)],) for layer in layers}
        else:
            instances = {rule.leaf: (rule.sources,)}
        for leaf, leaf_groups in instances.items():
            if leaf not in leaf_shapes:
                continue
            assert leaf not in found, f"two weight rules fill {leaf}"
            packed_shape = leaf_shapes[leaf][1:] if stacked else leaf_shapes[leaf]
            shapes = PACKERS[rule.packing].source_shapes(packed_shape)
            assert len(shapes) == len(rule.sources), rule
            found[leaf] = LeafSources(leaf, rule.packing, leaf_groups, stacked, shapes, packed_shape)
    assert found.keys() == leaf_shapes.keys(), f"no weight rule fills {sorted(leaf_shapes.keys() - found.keys())}"
    return found


def as_stored(sources: dict[str, LeafSources], names: Collection[str]) -> dict[str, LeafSources]:
    """The sources under the names that a checkpoint has for them: those of a decoder that was saved without a head do
    not begin with "model."."""
    if any(name.startswith(_PREFIX) for name in names):
        return sources
    bare = {
        leaf: replace(
            source, groups=tuple(tuple(name.removeprefix(_PREFIX) for name in group) for group in source.groups)
        )
        for leaf, source in sources.items()
    }
    wanted = {name for source in bare.values() for group in source.groups for name in group}
    return bare if wanted & set(names) else sources


def check_tensors(sources: Mapping[str, LeafSources], tensors: Mapping[str, TensorInfo], *, where: str) -> None:
    """Compares what the leaves need with what the checkpoint holds.

    Args:
        sources: From `leaf_sources`.
        tensors: Name -> info of every tensor of the checkpoint.
        where: Name of the checkpoint, for the message.

    Raises:
        ModelLoadError: Lists all missing, unexpected and mis-shaped tensors, and those whose dtype is no float.
    """
    expected = {
        name: shape
        for leaf in sources.values()
        for group in leaf.groups
        for name, shape in zip(group, leaf.shapes, strict=True)
    }
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    # Where the head is the embedding there may be a copy of it, and a model that pools has no use for it.
    has_no_head = "lm_head" not in sources
    unexpected = [
        f"{name} {list(info.shape)}"
        for name, info in tensors.items()
        if name not in expected
        and not (HARMLESS.match(name) or KV_SCALE.match(name) or (has_no_head and name == "lm_head.weight"))
    ]
    misshaped = [
        f"{name}: {list(tensors[name].shape)} in the checkpoint, {list(shape)} from config.json"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    dtypes = [
        f"{name}: {tensors[name].dtype}"
        for name in expected
        if name in tensors and tensors[name].dtype not in FLOAT_DTYPES
    ]
    problems = [
        listed("missing tensors", missing),
        listed("unexpected tensors", unexpected),
        listed("tensors of a wrong shape", misshaped),
        listed(f"tensors whose dtype is not one of {', '.join(FLOAT_DTYPES)}", dtypes),
    ]
    if any(problems):
        raise ModelLoadError(f"The weights in {where} do not fit the model:\n" + "\n".join(filter(None, problems)))


def listed(title: str, items: list[str]) -> str:
    """A paragraph of an error message: how many, and the first of them; empty without items."""
    if not items:
        return ""
    shown = items[:_MAX_LISTED]
    if len(items) > len(shown):
        shown = [*shown, f"and {len(items) - len(shown)} more"]
    return f"{len(items)} {title}:\n  " + "\n  ".join(shown)
