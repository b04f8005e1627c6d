"""Which blocks of a model read which storages, recorded while it runs for the first time.

A forward may start before the last weights have arrived if each block waits for its own, provided that nobody else
reads them. Whether that is so is not guessed from the modules: every operator of one forward is looked at. What was
never seen to be read, or was read outside of the block that owns it, must be there before a forward starts.

Not recorded: TorchScript, compiled modules (their blocks run without their hooks), models with tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Modules that only hold others: what is inside of them are blocks.
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


@dataclass(frozen=True, slots=True)
class FirstUse:
    """What one forward of a root module showed.

    Attributes:
        tensors: All of the module, by ``id``.
        readers: For each of them that only its own blocks read: those blocks, in the order of first reading.
    """

    tensors: frozenset[int]
    readers: Mapping[int, tuple[torch.nn.Module, ...]]


class Recorder:
    """Looks on at one forward of a root module, and calls `done` with what it found; `None` if it came to nothing.

    Begun by the guard of the module, ended by a hook behind its forward, on the same thread.

    Args:
        root: The module; its tensors are on the device that it runs on.
        done: Called once, on the thread of the forward.
    """

    def __init__(self, root: torch.nn.Module, done: Callable[[FirstUse | None], None]) -> None:
        self._root, self._done = root, done
        self._thread = get_ident()
        self._inside: list[torch.nn.Module] = []
        blocks = list(blocks_of(root))
        owned = {id(block): {id(t) for t in _tensors(block)} for block in blocks}
        self._sightings = _Sightings(_by_storage(root), owned, self._inside)
        self._hooks = [
            hook
            for block in blocks
            for hook in (
                block.register_forward_pre_hook(self._enter, prepend=True),
                block.register_forward_hook(self._leave, always_call=True),
            )
        ]
        self._hooks.append(root.register_forward_hook(self._end, always_call=True))
        self._sightings.__enter__()  # type: ignore[no-untyped-call]

    def _enter(self, block: torch.nn.Module, args: object) -> None:
        if get_ident() == self._thread:
            self._inside.append(block)

    def _leave(self, block: torch.nn.Module, args: object, result: object) -> None:
        if get_ident() == self._thread and self._inside and self._inside[-1] is block:
            self._inside.pop()

    def _end(self, module: torch.nn.Module, args: object, result: object) -> None:
        if get_ident() != self._thread:
            return
        self._sightings.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        # After an error, the result is missing and so is the rest of what the forward reads.
        self._done(None if result is None else self._sightings.found())


class _Sightings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages that operators read or write, and the blocks they run in."""

    def __init__(
        self,
        tensors: Mapping[int, list[torch.Tensor]],
        owned: Mapping[int, set[int]],
        inside: list[torch.nn.Module],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors, self._owned, self._inside = tensors, owned, inside
        self._readers: dict[int, dict[int, torch.nn.Module]] = {}
        self._astray: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _among(args):
            self._note(tensor)
        for tensor in _among(kwargs.values()):
            self._note(tensor)
        return func(*args, **kwargs)

    def _note(self, tensor: torch.Tensor) -> None:
        place = _pointer_of(tensor)
        for mine in self._tensors.get(place, ()) if place else ():
            block = next((each for each in reversed(self._inside) if id(mine) in self._owned[id(each)]), None)
            if block is None:
                self._astray.add(place)
            else:
                self._readers.setdefault(place, {})[id(block)] = block

    def found(self) -> FirstUse:
        readers = {
            id(tensor): tuple(blocks.values())
            for place, blocks in self._readers.items()
            if place not in self._astray
            for tensor in self._tensors[place]
        }
        return FirstUse(frozenset(id(tensor) for same in self._tensors.values() for tensor in same), readers)


def can_be_recorded(root: torch.nn.Module) -> bool:
    """Whether the blocks of a module run through their hooks, and its operators can be seen."""
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
            return False
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            return False
    return all(type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for tensor in _tensors(root))


def blocks_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that a forward passes through one after the other, each with weights of its own.

    They are the items of lists of modules, at whatever depth these lie, and the largest modules without such lists
    beside them.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            for item in child.children():
                yield from blocks_of(item) if isinstance(item, _CONTAINERS) else (item,)
        elif any(isinstance(inner, _CONTAINERS) for inner in child.modules()):
            yield from blocks_of(child)
        else:
            yield child


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _by_storage(module: torch.nn.Module) -> dict[int, list[torch.Tensor]]:
    found: dict[int, list[torch.Tensor]] = {}
    for tensor in _tensors(module):
        place = _pointer_of(tensor)
        if place:
            found.setdefault(place, []).append(tensor)
    return found


def _pointer_of(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # such as fake tensors and sparse ones
        return 0


def _among(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _among(value)
