"""One loaded model: the loader's object, its parts, and the guard that refuses a forward while it is away."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from modelcache.dataplane.first_use import FirstUse
from modelcache.dataplane.guard import ResidencyGuard
from modelcache.dataplane.inventory import Slot, Walk, Wrapper, slots_of
from modelcache.dataplane.loading import adapters
from modelcache.dataplane.parts import Part
from modelcache.dataplane.structure import Structure
from modelcache.spec import ModelSpec

if TYPE_CHECKING:
    from modelcache.dataplane.dispatch.form import Dispatch

log = logging.getLogger("modelcache.dataplane")
_CPU = torch.device("cpu")


@dataclass(slots=True, eq=False)
class Root:
    """One module of a model, the parts its tensors lie in, and its guard; TorchScript modules take no hooks."""

    module: torch.nn.Module
    parts: tuple[Part, ...]
    guard: ResidencyGuard
    hooks: tuple[RemovableHandle, ...]


@dataclass(slots=True, eq=False)
class LoadedModel:
    """What the mover knows of a model that was loaded.

    Attributes:
        spec: As registered.
        model: The loader's object.
        modules: Its modules by component.
        parts: Where its bytes are, in first-use order; none when it has no bytes.
        names: The tensor object behind each full name, as the last look found it.
        wrappers: Tensor subclasses that must follow their inner tensors.
        empties: Tensors without elements: they have no bytes, but a device.
        idea: Where the object believed to be when it was loaded.
        roots: Its modules with their guards.
        dispatch: The form in which it runs with its offloaded parts in RAM.
        lock: Guards `names`, `wrappers`, `empties`, `device`, `dispatch`, `structure` and the guards' flags. Taken
            below the lock of a part, never the other way round.
        device: Where the object was last told that it is.
        first_use: What operators read of it in one call; `None` while not known.
        structure: What its modules held when they were last found to hold `names`; `None` if not known.
    """

    spec: ModelSpec
    model: object
    modules: Mapping[str, torch.nn.Module]
    parts: tuple[Part, ...]
    names: dict[str, torch.Tensor]
    wrappers: list[Wrapper]
    empties: list[Slot]
    idea: adapters.DeviceIdea
    lock: AbstractContextManager[object]
    dispatch: Dispatch | None = None
    roots: list[Root] = field(default_factory=list)
    device: torch.device | None = None
    structure: Structure | None = None
    first_use: FirstUse | None = None

    def guard(self, found: Walk) -> None:
        """Put a guard on every root module; nothing is resident yet."""
        for component, module in self.modules.items():
            prefix = f"{component}." if component else ""
            inside = {id(slot.tensor) for slot in found.slots if slot.name.startswith(prefix)}
            parts = tuple(part for part in self.parts if not inside.isdisjoint(part.members))
            guard = ResidencyGuard(self.spec.name)
            hooks: tuple[RemovableHandle, ...] = ()
            if not isinstance(module, torch.jit.ScriptModule):
                hooks = (
                    module.register_forward_pre_hook(guard, prepend=True),
                    module.register_state_dict_pre_hook(guard.before_state_dict),  # type: ignore[no-untyped-call]
                )
            self.roots.append(Root(module, parts, guard, hooks))

    def refuse(self, why: str) -> None:
        """Let the guards refuse everything: the bytes are about to be given up."""
        with self.lock:
            for root in self.roots:
                root.guard.give_up(why)

    def unguard(self, emptied: Iterable[torch.Tensor] = ()) -> None:
        """Take the guards off, but for those in front of tensors that were left without bytes."""
        ids = {id(tensor) for tensor in emptied}
        with self.lock:
            for component, root in zip(self.modules, self.roots, strict=False):  # admission may have failed half way
                prefix = f"{component}." if component else ""
                lost = [each for name, each in self.names.items() if id(each) in ids and name.startswith(prefix)]
                if lost:
                    root.guard.miss(lost)
                    continue
                for hook in root.hooks:
                    hook.remove()
            self.roots.clear()

    def settle_in(self, top: torch.device, holds_copies: bool) -> None:
        """After a part changed: guards, wrappers, empty tensors and the object's own idea of its device follow.

        Args:
            top: The device of the top tier.
            holds_copies: The top tier is VRAM, not RAM.
        """
        with self.lock:
            self._settle_in(top, holds_copies)

    def _settle_in(self, top: torch.device, holds_copies: bool) -> None:
        from_dispatch = self._settle_dispatch(holds_copies)
        for root in self.roots:
            root.guard.resident = from_dispatch or all(is_on_top(part, holds_copies) for part in root.parts)
            root.guard.has_bytes = root.guard.resident or all(has_bytes(part) for part in root.parts)
        resident = from_dispatch or all(is_on_top(part, holds_copies) for part in self.parts)
        self._follow()
        device = top if resident else _CPU
        if device != self.device:
            self.device = None  # neither, should one of these fail
            for slot in self.empties:
                _move_empty(slot.tensor, device)
            adapters.point_at(self.model, device)
            self.device = device

    def _settle_dispatch(self, holds_copies: bool) -> bool:
        """Whether the model runs from its dispatch: the offloaded parts are in RAM only, the others on the device."""
        if self.dispatch is None:
            return False
        if all(is_in_ram_only(part) if part.is_offloaded else is_on_top(part, holds_copies) for part in self.parts):
            self.dispatch.put_on()
        else:
            self.dispatch.take_off()
        return self.dispatch.is_on

    def _follow(self) -> None:
        for wrapper in self.wrappers:
            inner = [slot.tensor for slot in slots_of(wrapper)]
            # The inner tensors of a model on disk have no shape to build an outer one over; those of one that is half
            # way are in two places. Both are behind the guard.
            if len({tensor.device for tensor in inner}) == 1 and not self._is_away(inner):
                self._exchange(wrapper)

    def _exchange(self, wrapper: Wrapper) -> None:
        try:
            wrapper.follow()
        except RuntimeError as error:
            # Its inner tensors are where they belong, and they are what computes.
            log.warning(
                "model=%s tensor=%s goes on saying that it is on %s, because it cannot be exchanged: %s",
                self.spec.name,
                wrapper.name,
                wrapper.outer.device,
                str(error).partition("\n")[0],
            )

    def _is_away(self, inner: list[torch.Tensor]) -> bool:
        members = (part.members.get(id(tensor)) for part in self.parts for tensor in inner)
        return any(member is not None and tuple(member.tensor.shape) != member.view.shape for member in members)


def is_on_top(part: Part, holds_copies: bool) -> bool:
    """Whether the whole part is where its models run, or on its way there with every tensor pointing at it."""
    if holds_copies:
        return all(part.is_on_device(segment) for segment in range(part.num_segments))
    return all(copy is not None for copy in part.ram)


def has_bytes(part: Part) -> bool:
    """Whether every segment is on some tier above the disk."""
    return all(part.ram[segment] is not None or part.vram[segment] is not None for segment in range(part.num_segments))


def is_in_ram_only(part: Part) -> bool:
    """Whether the whole part is in RAM and nothing of it in VRAM."""
    return all(copy is not None for copy in part.ram) and not any(copy is not None for copy in part.vram)


def _move_empty(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
