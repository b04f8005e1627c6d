"""What stands before a cached model: a forward while it is away is an error, and whose the model is can be seen."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from modelcache.errors import ModelNotResidentError, MoveError


class ResidencyGuard:
    """A forward pre-hook of a root module: one attribute test while its parts are on the top tier, an error else.

    Attributes:
        name: Of the model; empty once it is nobody's to move.
        problem: Why the weights did not arrive that a call was allowed to start for; empty otherwise.
        resident: It may run.
        has_bytes: Every tensor has its bytes, on one tier or the other. Those of a model on disk have none, and what is
            saved or copied of it then would be a model of empty tensors.
        gone: Why the bytes were given up for good; empty otherwise.
    """

    __slots__ = ("_lost", "gone", "has_bytes", "name", "problem", "resident")

    def __init__(self, name: str, resident: bool = False) -> None:
        self.name, self.resident, self.problem, self.has_bytes = name, resident, "", True
        self.gone = ""
        self._lost: tuple[weakref.ref[torch.Tensor], ...] | None = None

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        """Refuse the forward of a model that is away.

        Raises:
            ModelNotResidentError: While `resident` is false.
            MoveError: The same, and there is a `problem`.
        """
        if not self.resident:
            if self.problem and not self.gone:
                raise MoveError(self.name, "ram", "vram", self.problem)
            self._refuse()

    def before_state_dict(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        """Refuse to list tensors without bytes; a pre-hook of `state_dict`.

        Raises:
            ModelNotResidentError: While `has_bytes` is false.
        """
        if not self.has_bytes:
            self._refuse()

    def give_up(self, why: str) -> None:
        """The bytes are about to be given up for good."""
        self.resident = self.has_bytes = False
        self.gone = why

    def miss(self, tensors: Iterable[torch.Tensor]) -> None:
        """These were left without bytes; it is their model again once none of them is."""
        self.resident = self.has_bytes = False
        self._lost = tuple(map(weakref.ref, tensors))

    @property
    def is_gone(self) -> bool:
        """Whether the bytes were given up for good, and nobody gave the model others since."""
        if self.gone and self._lost is not None:
            if any((tensor := ref()) is not None and not tensor.numel() for ref in self._lost):
                return True
            self.name = self.gone = ""
            self.resident = self.has_bytes = True
        return bool(self.gone)

    def _refuse(self) -> None:
        """Raise, unless the model turns out to have weights that are none of the cache's."""
        why = self.gone
        if self.is_gone or not why:
            raise ModelNotResidentError(self.name, self.gone)

    def __reduce__(self) -> tuple[type[ResidencyGuard], tuple[str, bool]]:
        if not self.has_bytes:
            self._refuse()
        # A pickled or deep-copied module is nobody's to move.
        return (ResidencyGuard, ("", True))
