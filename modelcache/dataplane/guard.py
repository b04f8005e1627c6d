"""What stands before a cached model: a forward while it is away is an error, and whose the model is can be seen."""

from __future__ import annotations

from collections.abc import Callable

import torch

from modelcache.errors import ModelNotResidentError, MoveError


class ResidencyGuard:
    """A forward pre-hook of a root module: two attribute tests while its parts are on the top tier, an error else.

    `record` is called before a forward that is to be looked on at, with the module. `problem` is why the weights did
    not arrive that a forward was allowed to start for; empty otherwise.
    """

    __slots__ = ("name", "problem", "record", "resident")

    def __init__(self, name: str, resident: bool = False) -> None:
        self.name, self.resident, self.problem = name, resident, ""
        self.record: Callable[[torch.nn.Module], None] | None = None

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
        # Asked first, so that the compiler does not even look at what follows.
        if not torch.compiler.is_compiling() and self.record is not None:
            self.record(module)

    def __reduce__(self) -> tuple[type[ResidencyGuard], tuple[str, bool]]:
        # A pickled or deep-copied module is nobody's to move.
        return (ResidencyGuard, ("", True))
