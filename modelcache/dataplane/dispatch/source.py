"""The files that a dispatch keeps weights in, as a source to fill parts from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from modelcache.dataplane.files.reading import ChangedError, UnreadableError, read_into, read_tensor
from modelcache.dataplane.files.weight_files import FileBytes
from modelcache.dataplane.loading.source import Landed, Report, Source
from modelcache.dataplane.materialize.record import Mark, mark_of
from modelcache.errors import WeightsError

_REMEDY = "Restore the file, or load the model again, into an offload folder of its own, and register it anew."


class DispatchSource:
    """Reads each tensor from where its dispatch has it, straight into the target.

    Args:
        places: By full tensor name.
        marks: What tensors held when they were dispatched, where that was recorded.
        rest: For the tensors of the model that are in no file of the dispatch.
        model_name: For errors.
    """

    def __init__(
        self, places: Mapping[str, FileBytes], marks: Mapping[str, Mark], rest: Source | None, *, model_name: str
    ) -> None:
        self._places, self._marks, self._rest, self._model_name = places, marks, rest, model_name
        # A loader called again may write the very files that are read here, and need not stand two calls at once.
        self._turn: AbstractContextManager[object] = threading.Lock() if rest is not None else contextlib.nullcontext()

    def describe(self) -> str:
        """The folder, or the first of several."""
        if self._rest is not None and not self._places:
            return self._rest.describe()
        return str(Path(next(iter(self._places.values())).path).parent)

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""
        rest = frozenset() if self._rest is None else self._rest.names()
        return rest.union(self._places)

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Read each named tensor into its target.

        Raises:
            WeightsError: A file is missing, damaged or changed since the model was loaded, or holds other weights than
                the model was dispatched with.
            LoaderError: The loader, called again for what is in no file, failed.
        """
        with self._turn:
            self._fill(targets, report, landed)

    def _fill(self, targets: Mapping[str, torch.Tensor], report: Report | None, landed: Landed | None) -> None:
        names = [name for name in targets if name in self._places]
        try:
            read_into([(self._places[name], targets[name]) for name in names], report)
        except UnreadableError as error:
            problem = error.since("the model was first read") if isinstance(error, ChangedError) else error.problem
            name = names[error.position]
            raise WeightsError(self._model_name, error.path, f"{problem}. {_REMEDY}", name) from error.__cause__
        for name in names:
            self._check(name, targets[name])
        others = {name: target for name, target in targets.items() if name not in self._places}
        if others:
            assert self._rest is not None, "asked for what this source does not offer"
            self._rest.fill(others, report, landed)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        mark = self._marks.get(name)
        if mark is None:
            return
        # The model may have been given another dtype since its dispatch. The file was not.
        stored = tensor if tensor.dtype == mark.dtype else read_tensor(self._places[name])
        if mark_of(stored) == mark:
            return
        problem = (
            "holds other weights than the model was dispatched with; load it again, into a folder of its own: "
            "offload folders cannot be shared"
        )
        raise WeightsError(self._model_name, self._places[name].path, problem, name)
