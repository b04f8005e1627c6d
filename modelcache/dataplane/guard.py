"""What stands before a cached model: a forward while it is away is an error, and whose the model is can be seen."""

from __future__ import annotations

import torch

from modelcache.errors import ModelNotResidentError, MoveError


class ResidencyGuard:
    """A forward pre-hook of a root module: one attribute test while its parts are on the top tier, an error else.

    `problem` is why the weights did not arrive that a call was allowed to start for; empty otherwise.
    """

    __slots__ = ("name", "problem", "resident")

    def __init__(self, name: str, resident: bool = False) -> None:
        self.name, self.resident, self.problem = name, resident, ""

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

    def __reduce__(self) -> tuple[type[ResidencyGuard], tuple[str, bool]]:
        # A pickled or deep-copied module is nobody's to move.
        return (ResidencyGuard, ("", True))
