"""Where a model's bytes come from, and may be read from again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from modelcache.dataplane.image import View, WeightImage
from modelcache.dataplane.images.format import Described
from modelcache.dataplane.images.origin import Origin

Report = Callable[[int], None]
Landed = Callable[[str, Hashable], None]


class Source(Protocol):
    """The origin of a model's weights, readable more than once.

    Names are full tensor names as `adapters.modules_of` spells them: ``"<component>.<parameter or buffer>"``, without a
    component for an object that is one module.
    """

    def describe(self) -> str:
        """For people and errors: a path or a loader's name."""

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Write the bytes of each named tensor into its target, in place.

        Args:
            targets: Full name -> CPU tensor of the final dtype and shape, over the model's RAM block.
            report: Called with the number of bytes read since the last call.
            landed: Called with the name of each target that is complete while others are not, and a digest of what was
                read for it: while it stays the same, so do the target's bytes. `None` says nothing. Need not be called.

        Raises:
            WeightsError: A file is missing, damaged, or changed since the model was first read.
            LoaderError: A loader called again raised or built another structure.
        """


@dataclass(frozen=True, slots=True)
class Keepable:
    """That a model's bytes can be found again by another process, which builds the same model around them.

    Attributes:
        origin: What the model is made from.
        about: What is kept with the bytes, to build it.
        rebuild: Builds it on ``meta`` around an image of this layout; raises `UnlikeError` when it becomes another one.
        found: The image that this process found; the model is on ``meta`` then.
    """

    origin: Origin
    about: Mapping[str, object]
    rebuild: Callable[[WeightImage, Sequence[Mapping[str, View]]], object]
    found: Described | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """What a loader made.

    Attributes:
        model: What `get` will give: a module, a pipeline, any object an adapter knows. Tensors may be on ``meta`` if
            `source` can fill them.
        source: How to read the bytes again; `None` when only the object itself has them.
        keepable: How another process can do without that; `None` when it cannot, or does not need to.
    """

    model: object
    source: Source | None
    keepable: Keepable | None = None
