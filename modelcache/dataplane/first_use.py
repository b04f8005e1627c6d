"""Which tensors of a model its operators read, recorded during one call.

A call may start before the last weights have arrived if whatever reads them can be made to wait, and what can are
torch's operators on the thread of the call. So weights count as waited for only once an operator was seen reading them:
a kernel that is handed a bare address is not seen, and its weights must be there before a call starts.

Not recorded: TorchScript, models with tensor subclasses. Nothing is early once the compiler made code in this process:
that code reads weights unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COMPILER = "torch._dynamo.convert_frame"


@dataclass(frozen=True, slots=True)
class FirstUse:
    """What one call showed.

    Attributes:
        tensors: All of the modules, by ``id``.
        seen: Those of them that operators read.
    """

    tensors: frozenset[int]
    seen: frozenset[int]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, notes the tensors of some modules that operators of this thread read or write."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: dict[int, set[int]] = {}
        for module in modules:
            for tensor in tensors_of(module):
                self._tensors.setdefault(pointer_of(tensor), set()).add(id(tensor))
        self._tensors.pop(0, None)
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in among((args, tuple(kwargs.values()))):
            self._seen |= self._tensors.get(pointer_of(tensor), _NONE)
        return func(*args, **kwargs)

    def found(self) -> FirstUse:
        """What was seen so far."""
        return FirstUse(frozenset().union(*self._tensors.values()), frozenset(self._seen))


_NONE: frozenset[int] = frozenset()


def can_be_recorded(module: torch.nn.Module) -> bool:
    """Whether the operators of a module can be seen, and name its tensors."""
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return False
    return all(type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for tensor in tensors_of(module))


def has_compiled() -> bool:
    """Whether torch's compiler made code in this process: such code reads weights that no operator is seen to read."""
    compiler = sys.modules.get(_COMPILER)
    return compiler is not None and getattr(compiler, "FRAME_COUNTER", 1) > 0


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def pointer_of(tensor: torch.Tensor) -> int:
    """Where the storage of a tensor begins; 0 where it has no address."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # such as fake tensors and sparse ones
        return 0


def among(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from among(value)
