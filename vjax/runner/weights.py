"""The weights of one engine: on the device, on the host while it sleeps, or gone until somebody brings them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vjax.errors import EngineAsleepError, VjaxValidationError
from vjax.models.functional import FunctionalModel
from vjax.parallel.sharding import named_sharding
from vjax.runner.memory import explained
from vjax.weights.loader import pack_leaf, place
from vjax.weights.update import ArraySpec, Key, LeafUpdate, plan_update

#: Leaves that are measured beside a checkpoint's parameters: scales of a quantised KV cache.
_KEPT = frozenset({"vectors.k_scale", "vectors.v_scale"})


class Weights:
    """Owns the leaves.

    Leaves are exchanged one at a time, the old one deleted before the new one is made: a full device has no room for
    both, and the new one gets the place of the old.

    Args:
        model: Says what leaves there are.
        leaves: In the order of `model.leaf_names`.
        mesh: Where they live.
        load: Makes the leaves again as the engine got them at its start.
    """

    def __init__(
        self,
        model: FunctionalModel,
        leaves: tuple[jax.Array, ...],
        mesh: Mesh,
        load: Callable[[], tuple[jax.Array, ...]] | None = None,
    ):
        self._model = model
        self._mesh = mesh
        self._load = load
        self._leaves: dict[str, jax.Array] = dict(zip(model.leaf_names, leaves, strict=True))
        #: All leaves between `to_host` and `restore`; what cannot be had again after `drop`.
        self._on_host: dict[str, np.ndarray] = {}
        self._updates: dict[tuple[Key, ...], LeafUpdate] = {}
        #: Between the first and the last leaf of an update.
        self._is_mixed = False
        self._kept = _KEPT & set(model.leaf_names)

    @property
    def are_on_device(self) -> bool:
        return len(self._leaves) == len(self._model.leaf_names)

    def leaves(self) -> tuple[jax.Array, ...]:
        """In the order of `model.leaf_names`. They are on the device."""
        return tuple(self._leaves[name] for name in self._model.leaf_names)

    # ---- sleep --------------------------------------------------------------------------------------------------

    def to_host(self) -> None:
        """Moves all leaves that are on the device to the host."""
        for name in list(self._leaves):
            self._on_host[name] = np.asarray(self._leaves[name])
            self._leaves.pop(name).delete()

    def drop(self) -> None:
        """Frees the leaves, wherever they are; only those that belong to no checkpoint are kept, on the host."""
        kept = {name: array for name, array in self._on_host.items() if name in self._kept}
        for name, leaf in self._leaves.items():
            if name in self._kept and not leaf.is_deleted():
                kept[name] = np.asarray(leaf)
        self._on_host = kept
        self.delete()

    def restore(self) -> None:
        """Puts all leaves onto the device: from the host, else as the engine got them at its start.

        Raises:
            OutOfMemoryError: The device has no room for them; they stay where they are.
            ModelLoadError: The checkpoint cannot be read any more.
        """
        if self.are_on_device:
            return
        if len(self._on_host) == len(self._model.leaf_names):
            try:
                with explained(self._model.leaf_specs.values(), "the weights"):
                    for name in self._model.leaf_names:
                        self._leaves[name] = jax.device_put(self._on_host[name], self._sharding(name), may_alias=False)
                    jax.block_until_ready(self._leaves)
            except BaseException:
                self.delete()
                raise
        else:
            self.reload()
        self._on_host = {}

    def reload(self) -> None:
        """Loads all leaves anew, as at the engine's start.

        Raises:
            ModelLoadError: The checkpoint cannot be read any more; the leaves are gone.
        """
        assert self._load is not None, "the engine was built from leaves"
        self.drop()
        with explained(self._model.leaf_specs.values(), "the weights"):
            self._leaves = dict(zip(self._model.leaf_names, self._load(), strict=True))
        self._on_host = {}

    def delete(self) -> None:
        """Frees the leaves on the device."""
        for leaf in self._leaves.values():
            if not leaf.is_deleted():
                leaf.delete()
        self._leaves = {}

    # ---- reading and writing ------------------------------------------------------------------------------------

    def host_copy(self, name: str) -> np.ndarray:
        """One leaf as numpy.

        Raises:
            VjaxValidationError: There is no such leaf.
            EngineAsleepError: The weights were dropped.
        """
        if name not in self._model.leaf_specs:
            raise VjaxValidationError(
                f"There is no leaf {name!r}; get_weights() without names gives all of them.", parameter="names"
            )
        if (leaf := self._leaves.get(name)) is None:
            if name not in self._on_host:
                raise EngineAsleepError("The weights were dropped: call wake_up() or update_weights() first.")
            return self._on_host[name].copy()
        # By way of a copy on the device: an array keeps what numpy gets from it for as long as it lives itself.
        copy = place(leaf, self._sharding(name))
        try:
            return np.array(copy)
        finally:
            copy.delete()

    def begin_update(self, specs: Mapping[Key, ArraySpec], *, partial: bool) -> list[list[Key]]:
        """Checks an update. Nothing has changed yet; after the first `update` it has to go on to `end_update`, or to
        `abandon_update`.

        Args:
            specs: Of all arrays that the caller has; see `plan_update`.
            partial: Leaves that are not given stay as they are.

        Returns:
            The keys of the arrays that `update` wants together, in order.

        Raises:
            VjaxValidationError: See `plan_update`.
            EngineAsleepError: The update is partial, and the other weights are not there.
        """
        if partial and not self.are_on_device:
            raise EngineAsleepError(
                'The weights are not on the device: call wake_up(tags=["weights"]) before a partial update, or pass '
                "all of them."
            )
        updates = plan_update(
            specs,
            leaf_shapes={name: spec.shape for name, spec in self._model.leaf_specs.items()},
            rules=self._model.weight_rules,
            num_layers=self._model.arch.num_layers,
            kept=self._kept,
            partial=partial,
        )
        by_position = isinstance(next(iter(specs)), int)
        positions: dict[str, Key] = {leaf: i for i, leaf in enumerate(self._model.leaf_names)} if by_position else {}
        self._updates, self._is_mixed = {}, False
        for update in updates:
            keys = [positions.get(str(key), key) for key in update.keys]
            self._updates[tuple(keys)] = update
        return [list(keys) for keys in self._updates]

    def update(self, arrays: Mapping[Key, Any]) -> None:
        """Exchanges one leaf: `arrays` are one entry of what `begin_update` returned."""
        update = self._updates.pop(tuple(arrays))
        self._is_mixed = True
        self._on_host = {name: array for name, array in self._on_host.items() if name in self._kept}
        spec, sharding = self._model.leaf_specs[update.leaf], self._sharding(update.leaf)
        if (old := self._leaves.pop(update.leaf, None)) is not None:
            old.delete()
        values = dict(zip(update.keys, arrays.values(), strict=True))
        if update.sources is None:
            value = values[update.leaf]
            new = place(value if value.dtype == spec.dtype else value.astype(spec.dtype), sharding)
        else:
            tensors = [[values[key] for key in group] for group in update.groups]
            new = pack_leaf(update.sources, tensors, spec.dtype, sharding)
        # The next leaf finds the room that this one needed.
        self._leaves[update.leaf] = jax.block_until_ready(new)

    def end_update(self) -> None:
        """After the last `update`: the leaves are whole again."""
        assert not self._updates, "leaves are missing"
        for name in self._model.leaf_names:
            if name not in self._leaves:
                self._leaves[name] = jax.device_put(self._on_host[name], self._sharding(name), may_alias=False)
        self._on_host, self._is_mixed = {}, False

    def abandon_update(self) -> None:
        """Instead of `end_update`: drops the leaves if one has been exchanged."""
        self._updates = {}
        if self._is_mixed:
            self.drop()
            self._is_mixed = False

    def names(self) -> Sequence[str]:
        return self._model.leaf_names

    def _sharding(self, name: str) -> Any:
        return named_sharding(self._mesh, self._model.logical_axes[name])
