"""Keeps images of models whose source is slow to read, for the processes that come later.

Written by one thread in the background, from the RAM copy, a chunk at a time: the part is locked only while a chunk is
copied. A part that moves away or is written to meanwhile is not kept; it may be next time. What is written is an image
that a model could be built around again, which is tried before. The first thing the thread does is to delete what
nobody can use any more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import Event, Lock, Thread

import numpy as np
import torch

from modelcache.dataplane.fingerprint import CHUNK_BYTES, joined, sums_of
from modelcache.dataplane.images.format import Contents, Described, Sums
from modelcache.dataplane.images.kept import AbandonedError, KeptImages
from modelcache.dataplane.loaded import LoadedModel
from modelcache.dataplane.loading.skeletons import UnlikeError
from modelcache.dataplane.loading.source import Keepable
from modelcache.dataplane.parts import Part, point

log = logging.getLogger("modelcache.dataplane")

# How long the end of the cache waits for an image that is being written.
_PATIENCE_S = 1.0
# And then for its thread to notice.
_LAST_WAIT_S = 1.0


class Keeper:
    """Knows which parts can be kept, and keeps them. Thread-safe.

    Its lock guards the tables and the thread; it is never held while a part's lock is waited for.

    Args:
        kept: Where to.
    """

    def __init__(self, kept: KeptImages) -> None:
        self._kept = kept
        self._lock = Lock()
        self._keepable: dict[str, Keepable] = {}
        self._waiting: deque[Part] = deque()
        self._thread: Thread | None = None
        self._cancelled = Event()
        self._has_swept = False

    def admitted(self, model: LoadedModel, keepable: Keepable | None) -> None:
        """A model was laid out and did not move yet; one that was built around an image has its bytes there."""
        if keepable is None or len(model.parts) != 1 or model.dispatch is not None:
            return
        part = model.parts[0]
        if set(part.policies) != {model.spec.name}:
            return
        with self._lock:
            self._keepable[part.id] = keepable
        if keepable.found is not None:
            _lie_in(part, keepable.found)

    def staged(self, part: Part) -> None:
        """A part has RAM copies; keep it in the background if that makes sense."""
        with self._lock:
            if part.id not in self._keepable or part in self._waiting or self._cancelled.is_set():
                return
            if part.file is None and not part.diverged and all(copy is not None for copy in part.ram):
                self._waiting.append(part)
            elif self._has_swept:
                return
            if self._thread is None:
                self._thread = Thread(target=self._work, name="modelcache-keep", daemon=True)
                self._thread.start()

    def forget(self, part: Part) -> None:
        """A part is no more."""
        with self._lock:
            self._keepable.pop(part.id, None)
            if part in self._waiting:
                self._waiting.remove(part)

    def close(self) -> None:
        """Wait a moment for an image that is being written, and give it up after that. Idempotent.

        A thread that hangs in a slow disk is left to end by itself; it touches no part any more.
        """
        with self._lock:
            self._waiting.clear()
            thread = self._thread
        if thread is not None:
            thread.join(_PATIENCE_S)
        self._cancelled.set()
        if thread is not None:
            thread.join(_LAST_WAIT_S)

    def _work(self) -> None:
        self._sweep()
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                part = self._waiting.popleft()
                keepable = self._keepable.get(part.id)
            if keepable is None:
                continue
            try:
                self._keep(part, keepable)
            except AbandonedError as error:
                log.debug("not kept model=%s: %s", part.model, error)
            except Exception as error:  # the model is in RAM and does not need this; libraries raise anything
                log.warning("not kept model=%s: %s: %s", part.model, type(error).__name__, error)

    def _sweep(self) -> None:
        with self._lock:
            is_due, self._has_swept = not self._has_swept, True
        if is_due:
            try:
                self._kept.sweep()
            except Exception as error:  # what is not deleted is only in the way
                log.warning("kept images were not looked through: %s: %s", type(error).__name__, error)

    def _keep(self, part: Part, keepable: Keepable) -> None:
        views = tuple(part.names)
        try:
            with torch.inference_mode(mode=False):
                keepable.rebuild(part.image, views)
        except UnlikeError as error:
            log.info("not kept model=%s: it could not be built around an image: %s", part.model, error)
            self.forget(part)
            return
        contents = Contents("", part.model, part.image, views)
        file = self._kept.write(
            keepable.origin,
            contents,
            dict(keepable.about),
            lambda write: self._write(part, write),
            lambda: not self._cancelled.is_set(),
        )
        if file is None:
            found = self._kept.find(keepable.origin)
            file = None if found is None or (found.image, found.views) != (part.image, views) else found.file
        if file is None:
            return
        with part.lock:
            if self._cancelled.is_set():
                return
            if part.file is None and not part.diverged and list(file.prints) == part.original:
                part.file = file
                log.info("kept model=%s bytes=%d file=%s", part.model, file.size_bytes, file.path)

    def _write(self, part: Part, write: Callable[[memoryview], None]) -> tuple[list[int], Sums]:
        buffer = np.empty(CHUNK_BYTES, np.uint8)
        prints: list[int] = []
        written = Sums(part.image)
        for index, segment in enumerate(part.image.segments):
            sums: list[int] = []
            for start in range(0, segment.size_bytes, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, segment.size_bytes - start)]
                self._take(part, index, start, chunk)
                written.add(index, start, chunk.data)
                sums += sums_of(torch.from_numpy(chunk))
                write(chunk.data)
            prints.append(joined(segment.size_bytes, sums))
            if prints[-1] != part.original[index]:
                raise AbandonedError("its bytes are not what was loaded any more")
        return prints, written

    def _take(self, part: Part, segment: int, start: int, chunk: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        with part.lock:
            if self._cancelled.is_set():
                raise AbandonedError("the cache was closed")
            copy = part.ram[segment]
            if copy is None or segment in part.torn:
                raise AbandonedError("its RAM copy was given up")
            np.copyto(chunk, copy.memory[start : start + len(chunk)].numpy())


def _lie_in(part: Part, found: Described) -> None:
    """Let a part that was just laid out be one on disk, in this image."""
    if (part.image, tuple(part.names)) != (found.image, found.views):
        return  # its source fills it
    for member in list(part.members.values()):
        point(member, None)
    part.file = found.file
    part.with_loader = [False] * part.num_segments
    part.original, part.reference = list(found.file.prints), list(found.file.prints)
