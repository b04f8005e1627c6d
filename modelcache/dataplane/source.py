"""Where a model's bytes come from, and may be read from again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class Source(Protocol):
    """The origin of a model's weights, readable more than once.

    Names are full tensor names as `adapters.modules_of` spells them: ``"<component>.<parameter or buffer>"``, without a
    component for an object that is one module.
    """

    def describe(self) -> str:
        """For people and errors: a path or a loader's name."""

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""

    def fill(self, targets: Mapping[str, torch.Tensor], report: Callable[[int], None] | None = None) -> None:
        """Write the bytes of each named tensor into its target, in place.

        Args:
            targets: Full name -> CPU tensor of the final dtype and shape, over the model's RAM block.
            report: Called with the number of bytes read since the last call.

        Raises:
            WeightsError: A file is missing, damaged, or changed since the model was first read.
            LoaderError: A loader called again raised or built another structure.
        """


@dataclass(frozen=True, slots=True)
class Built:
    """What a loader made.

    Attributes:
        model: What `get` will give: a module, a pipeline, any object an adapter knows. Tensors may be on ``meta`` if
            `source` can fill them.
        source: How to read the bytes again; `None` when only the object itself has them.
    """

    model: object
    source: Source | None
