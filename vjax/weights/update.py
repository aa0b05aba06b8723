"""New values for the leaves of a running engine: which array goes where, decided from names, shapes and dtypes alone.
No jax, no array data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vjax.errors import VjaxValidationError
from vjax.models.weight_rules import WeightRule
from vjax.weights.mapping import HARMLESS, LeafSources, as_stored, leaf_sources, listed
from vjax.weights.packing import Shape

#: An array's name: a leaf's, a checkpoint tensor's, or a leaf's place in the order of the model's leaves.
Key = str | int
#: Shape, and name of the dtype.
ArraySpec = tuple[Shape, str]

#: Arrays of these are converted to a leaf's own dtype.
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class LeafUpdate:
    """Where one leaf's new value comes from: one array that is the leaf, or checkpoint tensors to be packed."""

    leaf: str
    #: Of the arrays, in packing order: one group, or one per layer when the leaf stacks layers.
    groups: tuple[tuple[Key, ...], ...]
    #: None: the array is the leaf itself.
    sources: LeafSources | None

    @property
    def keys(self) -> list[Key]:
        return [key for group in self.groups for key in group]


def plan_update(
    arrays: Mapping[Key, ArraySpec],
    *,
    leaf_shapes: Mapping[str, Shape],
    rules: tuple[WeightRule, ...],
    num_layers: int,
    kept: frozenset[str],
    partial: bool,
) -> list[LeafUpdate]:
    """One update for each leaf that the arrays give, in the order of the leaves.

    Args:
        arrays: What the caller has. Names of leaves and of Hugging Face tensors may be mixed; the keys of a sequence of
            leaves are 0, 1, ...
        leaf_shapes: The model's, in its order.
        rules: How checkpoint tensors become leaves.
        kept: Leaves that no checkpoint tensor fills by a rule; they stay as they are where they are not given.
        partial: Leaves that are not given stay as they are. False: all others must be given.

    Raises:
        VjaxValidationError: Lists everything that is missing, unexpected, doubled, mis-shaped or of a wrong dtype.
    """
    arrays = _by_name(arrays, tuple(leaf_shapes)) if arrays and all(isinstance(key, int) for key in arrays) else arrays
    fillable = {name: shape for name, shape in leaf_shapes.items() if name not in kept}
    sources = as_stored(leaf_sources(rules, fillable, num_layers), [name for name in arrays if isinstance(name, str)])
    updates: list[LeafUpdate] = []
    used: set[Key] = set()
    missing: list[str] = []
    doubled: list[str] = []
    shapes: dict[Key, Shape] = {}
    for leaf, shape in leaf_shapes.items():
        source = sources.get(leaf)
        tensors = [] if source is None else [name for group in source.groups for name in group]
        given = [name for name in tensors if name in arrays]
        if leaf in arrays:
            updates.append(LeafUpdate(leaf, ((leaf,),), None))
            shapes[leaf] = shape
            if given and given != [leaf]:
                doubled.append(f"{leaf}, also as {given[0]}")
        elif source is not None and given:
            updates.append(LeafUpdate(leaf, source.groups, source))
            missing += [f"{name}, of the leaf {leaf}" for name in tensors if name not in arrays]
            for group in source.groups:
                shapes |= zip(group, source.shapes, strict=True)
        elif not partial and leaf not in kept:
            missing.append(f"{leaf} {list(shape)}" + (f", or {tensors[0]}" if tensors else ""))
        used |= {leaf, *tensors}
    tied_head = "lm_head" not in leaf_shapes
    unexpected = [
        str(name)
        for name in arrays
        if name not in used and not (HARMLESS.match(str(name)) or (tied_head and name == "lm_head.weight"))
    ]
    misshaped = [
        f"{name}: {list(arrays[name][0])} was given, {list(shape)} is the model's"
        for name, shape in shapes.items()
        if name in arrays and tuple(arrays[name][0]) != tuple(shape)
    ]
    dtypes = [f"{name}: {arrays[name][1]}" for name in shapes if name in arrays and arrays[name][1] not in FLOAT_DTYPES]
    problems = [
        listed("missing", missing),
        listed("unexpected names", unexpected),
        listed("given twice", doubled),
        listed("of a wrong shape", misshaped),
        listed(f"whose dtype is not one of {', '.join(FLOAT_DTYPES)}", dtypes),
    ]
    if any(problems):
        raise VjaxValidationError(
            "The arrays do not fit the model; nothing was changed. Names are those of get_weights() or of the "
            "Hugging Face checkpoint; partial=True leaves what is not named as it is.\n"
            + "\n".join(filter(None, problems)),
            parameter="params",
        )
    if not updates:
        raise VjaxValidationError("There are no arrays to update weights with; pass some.", parameter="params")
    return updates


def _by_name(arrays: Mapping[Key, ArraySpec], leaf_names: tuple[str, ...]) -> dict[Key, ArraySpec]:
    if len(arrays) != len(leaf_names):
        raise VjaxValidationError(
            f"{len(arrays)} arrays were given, and the model has {len(leaf_names)} leaves; nothing was changed. Pass "
            "all of them in the order of get_weights(), or a mapping of names to arrays.",
            parameter="params",
        )
    return dict(zip(leaf_names, arrays.values(), strict=True))
