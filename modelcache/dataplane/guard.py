"""What stands before a cached model: a forward while it is away is an error, and whose the model is can be seen."""

from __future__ import annotations

import torch

from modelcache.errors import ModelNotResidentError, MoveError


class ResidencyGuard:
    """A forward pre-hook of a root module: one attribute test while its parts are on the top tier, an error else.

    Attributes:
        problem: Why the weights did not arrive that a call was allowed to start for; empty otherwise.
        resident: It may run.
        has_bytes: Every tensor has its bytes, on one tier or the other. Those of a model on disk have none, and what is
            saved or copied of it then would be a model of empty tensors.
    """

    __slots__ = ("has_bytes", "name", "problem", "resident")

    def __init__(self, name: str, resident: bool = False) -> None:
        self.name, self.resident, self.problem, self.has_bytes = name, resident, "", True

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        """Refuse the forward of a model that is away.

        Raises:
            ModelNotResidentError: While `resident` is false.
            MoveError: The same, and there is a `problem`.
        """
        if not self.resident:
            if self.problem:
                raise MoveError(self.name, "ram", "vram", self.problem)
            raise ModelNotResidentError(self.name)

    def before_state_dict(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        """Refuse to list tensors without bytes; a pre-hook of `state_dict`.

        Raises:
            ModelNotResidentError: While `has_bytes` is false.
        """
        if not self.has_bytes:
            raise ModelNotResidentError(self.name)

    def __reduce__(self) -> tuple[type[ResidencyGuard], tuple[str, bool]]:
        if not self.has_bytes:
            raise ModelNotResidentError(self.name)
        # A pickled or deep-copied module is nobody's to move.
        return (ResidencyGuard, ("", True))
