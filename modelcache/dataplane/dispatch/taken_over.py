"""What became of a loader's model before it was laid out. Imports no accelerate: most were never dispatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache.dataplane.loading.source import Source
from modelcache.dataplane.materialize.journal import Swap, undo_all

if TYPE_CHECKING:
    from modelcache.dataplane.dispatch.form import Dispatch


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A model without hooks.

    Attributes:
        source: What fills its tensors on ``meta``, and may be read again.
        dispatch: Its other form; `None` if it can only run whole.
        whole_only: Why it can only run whole, if that needs saying.
        swaps: What was done to the model.
    """

    source: Source | None
    dispatch: Dispatch | None
    whole_only: str = ""
    swaps: Sequence[Swap] = ()

    def undo(self) -> None:
        """Leave the model as it was: it is not taken after all."""
        undo_all(self.swaps)
