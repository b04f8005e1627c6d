"""The form in which a dispatched model runs that does not fit whole: hooks on, placeholders in place."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.journal import ABSENT, Entry, Swap, swap_all, undo_all
from modelcache.dataplane.materialize.slots import Slot


@dataclass(slots=True, eq=False)
class Mapped:
    """One weight that a hook brings in.

    Attributes:
        slot: Where the model has it, or its placeholder.
        tensor: The model's own tensor.
        table: Where the hook's mapping has it, under `key`.
        offload: The hook, which looks it up as `local`.
        entry: What `table` shall hold: the bytes of the model's part, wherever they are.
    """

    slot: Slot
    tensor: torch.Tensor
    table: MutableMapping[str, Any]
    key: str
    offload: state.Offload | None
    local: str
    entry: torch.Tensor | None = None

    def foreign(self) -> torch.Tensor | None:
        """What somebody put where the placeholder, the entry or the hook's mapping belongs."""
        now = self.slot.table.get(self.slot.key)
        if now is not None and not now.is_meta and now is not self.tensor:
            return now
        if self.offload is not None and self.offload.has_other_weights:
            now = self.offload.weights_now().get(self.local)
        elif self.table.get(self.key) is not self.entry:
            now = self.table.get(self.key)
        else:
            return None
        return now if isinstance(now, torch.Tensor) and not now.is_meta else None

    def put_back(self) -> None:
        """Let the hook find the entry again."""
        if self.offload is not None:
            self.offload.put_back()
        self.table[self.key] = self.entry


@dataclass(slots=True, eq=False)
class Dispatch:
    """The form in which a model runs that does not fit whole: offloaded weights come in one module after the other.

    Attributes:
        swaps: From this form to the whole one; only pointers.
        forwards: Those of them that concern a module's forward, with the module's name.
        offloaded: The tensors that are not on the device in this form, by ``id``.
        mapped: What hooks bring in.
        onload_bytes: What a forward brings in at once, as the device charges it.
        is_on: The model is in this form.
    """

    swaps: Sequence[Swap]
    forwards: Sequence[tuple[str, Entry]]
    offloaded: Mapping[int, torch.Tensor]
    mapped: Sequence[Mapped]
    onload_bytes: int
    is_on: bool = False

    def put_on(self) -> None:
        """Give the model its hooks and placeholders back.

        Raises:
            ValueError: Somebody patched what would be lost.
        """
        if not self.is_on:
            self._refuse_patches()
            undo_all(self.swaps)
            self.is_on = True

    def take_off(self) -> None:
        """Give the model its own tensors back; what was not adopted before is dropped.

        Raises:
            ValueError: Somebody patched what would be lost.
        """
        if self.is_on:
            self._refuse_patches()
            swap_all(self.swaps, check=lambda: None)
            self.is_on = False

    def has_foreign(self) -> bool:
        """Whether weights were put into the model or its hooks while it is in this form."""
        return self.is_on and any(mapped.foreign() is not None for mapped in self.mapped)

    def adopt_foreign(self) -> None:
        """Copy such weights into the model's own tensors, as the writes that they are.

        Raises:
            ValueError: They have another shape or type. Nothing was changed.
        """
        found = [(mapped, value) for mapped in self.mapped if (value := mapped.foreign()) is not None]
        for mapped, value in found:
            if (value.shape, value.dtype) != (mapped.tensor.shape, mapped.tensor.dtype):
                was = f"{list(mapped.tensor.shape)} {mapped.tensor.dtype}"
                raise ValueError(f"{mapped.slot.names[0]!r} was {was} and is {list(value.shape)} {value.dtype}")
        for mapped, value in found:
            mapped.tensor.detach().copy_(value.detach())
        for mapped, _ in found:
            mapped.put_back()

    def _refuse_patches(self) -> None:
        for name, swap in self.forwards:
            now = swap.table.get("forward", ABSENT)
            if now not in (ABSENT, swap.before if self.is_on else swap.after) and not state.is_hooked_forward(now):
                raise ValueError(
                    f"the forward of {name or 'the model'} was set after it was loaded, and would be lost; patch it in "
                    "the loader, before the dispatch"
                )
