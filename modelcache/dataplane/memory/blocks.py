"""RAM pieces: exact size, page-locked where the device can, counted while anything refers to them.

Each piece is an anonymous mapping of its own, so that giving one up returns its pages to the system. A tensor over a
piece keeps the mapping alive; nothing here unmaps, or hands out again, memory that somebody can still read.

A few mappings are kept ready ahead of demand (`spare_pages.py`): their pages are made by threads of the background, as
are those of pieces that were expected, and there both are page-locked. Whoever asks for a piece waits for none of it,
but for the unlocking of one that must be cut.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import Event, Lock

import torch

from modelcache.dataplane.device.protocol import Device
from modelcache.dataplane.memory.background import Background, Spawn
from modelcache.dataplane.memory.spare_pages import Pages, SparePages, charge_bytes

__all__ = ["RamBlocks", "RamPiece", "charge_bytes", "return_freed_heap"]

log = logging.getLogger("modelcache.dataplane")

_PIECE_BYTES = 64 << 20


class RamPiece:
    """One mapping. Made by `RamBlocks.allocate`, ended by `RamBlocks.release`.

    Attributes:
        memory: A flat uint8 tensor over the payload, zero at first.
        size_bytes: What it takes of RAM, whole pages.
        key: Of this piece among all.
    """

    __slots__ = ("_owner", "_pages", "in_background", "is_released", "key", "left", "memory", "size_bytes")

    def __init__(self, pages: Pages, payload_bytes: int, key: int) -> None:
        self._pages: Pages | None = pages
        # Everything laid over the piece refers to this object and not to the mapping: when it dies, nothing is left
        # that could read the memory, and the mapping may serve again.
        self._owner: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * pages.size_bytes).from_buffer(pages.mapping)
        self.size_bytes = pages.size_bytes
        self.key = key
        self.in_background = self.is_released = False  # both guarded by the lock of the blocks, and `left` as well
        self.left: Event | None = None  # set when the background has let it go, for whoever gives it up meanwhile
        self.memory: torch.Tensor = torch.frombuffer(self._owner, dtype=torch.uint8, count=payload_bytes)

    @property
    def locked(self) -> bool:
        """It is page-locked."""
        return self._pages is not None and self._pages.locked

    @property
    def pages(self) -> Pages:
        """The mapping, of a piece that was not given up."""
        assert self._pages is not None
        return self._pages

    def storage(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over a range of the piece with a torch storage of its own."""
        assert self._owner is not None
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._owner, dtype=torch.uint8, count=size_bytes, offset=offset_bytes)

    def buffer(self) -> memoryview:
        """The payload, for files; release it when done."""
        return self.memory.numpy().data

    def when_unread(self, then: Callable[[], object]) -> None:
        """Have something called once nothing refers to the memory any more; by any thread, wherever that is just then.

        It must not wait for anything, locks included.
        """
        assert self._owner is not None
        weakref.finalize(self._owner, then).atexit = False

    def let_go(self) -> None:
        """Drop this object's own references; the pages go back to the system with the last tensor over them."""
        self._pages = self._owner = None
        self.memory = torch.empty(0, dtype=torch.uint8)


class RamBlocks:
    """Makes, counts and page-locks pieces.

    Thread-safe. Its lock guards the page-locked figure, what is expected, and who is at a piece; it is never held
    across a call of the device.

    Args:
        device: It page-locks; `close` must be called before it is closed.
        page_locked_bytes: How much may be page-locked.
        spare_bytes: How much is kept ready beside the pieces that were asked for; needs `spawn`.
        piece_bytes: The size of what is made ahead of demand, that of a segment.
        spawn: Starts the threads of the background; `None` for none: then pieces are page-locked as they are made.
    """

    def __init__(
        self,
        device: Device,
        page_locked_bytes: int = 0,
        *,
        spare_bytes: int = 0,
        piece_bytes: int = _PIECE_BYTES,
        spawn: Spawn | None = None,
    ) -> None:
        self._device = device
        self._page_locked_budget_bytes = page_locked_bytes if device.holds_copies else 0
        self._page_locked_bytes = 0
        self._refused = False
        self._expected_bytes = 0
        self._lock: AbstractContextManager[object] = Lock()
        num_workers = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._background = Background(spawn, "modelcache-ram", num_workers)
        self._spare = SparePages(spare_bytes, piece_bytes)
        # Finalizers run on any thread at any point: a pop from a dictionary and a put into a queue is all that they do.
        self._live: dict[int, int] = {}
        # Given up: those for which room is kept, and those that somebody still refers to.
        self._returning: dict[int, Pages] = {}
        self._lingering: dict[int, Pages] = {}
        self._locked: dict[int, Pages] = {}
        self._next_key = 0

    @property
    def page_locked_bytes(self) -> int:
        """Page-locked now, that of spare memory included."""
        return self._page_locked_bytes

    @property
    def live_bytes(self) -> int:
        """Mapped now for pieces, those included that were given up here but that somebody's tensors still refer to."""
        return sum(list(self._live.values()))

    @property
    def spare_bytes(self) -> int:
        """Mapped now beside the pieces, and ready to be handed out."""
        return self._spare.ready_bytes

    @property
    def is_settled(self) -> bool:
        """The background has no spare memory left to make or to wipe."""
        return self._spare.is_complete

    def prepare(self) -> None:
        """Begin to make what is to be kept ready, in the background: something will be loaded, or just was."""
        if not self._background.start():
            return
        while size_bytes := self._spare.expect_new():
            self._background.submit(partial(self._make_spare, size_bytes))

    def expect(self, size_bytes: int) -> None:
        """Pieces of so many bytes will be asked for in a moment, and filled one after the other.

        The pages of those that were not ready are made in the background while the first one is being filled. Pieces
        asked for by others meanwhile count too, which does no harm.
        """
        with self._lock:
            self._expected_bytes = size_bytes

    def allocate(self, size_bytes: int) -> RamPiece:
        """A piece for `size_bytes` of payload, all zero.

        Raises:
            OSError: The system has no memory left to give.
        """
        charge = charge_bytes(size_bytes)
        pages = self._spare.take(charge)
        is_fresh = pages is None
        if pages is None:
            pages = self._map(charge)
        elif pages.size_bytes > charge:
            self._page_unlock(pages)  # it is locked again in the background
            pages.cut(charge)
        with self._lock:
            self._next_key += 1
            key = self._next_key
            is_expected = is_fresh and self._expected_bytes > 0
            self._expected_bytes = max(0, self._expected_bytes - charge)
        piece = RamPiece(pages, size_bytes, key)
        self._live[key] = charge
        piece.when_unread(partial(self._ended, key))
        wants_lock = self._page_locked_budget_bytes > 0 and not pages.locked
        if not self._background.start():
            if wants_lock:
                self._page_lock(pages)
        elif is_expected or wants_lock:
            self._background.submit(partial(self._settle, piece, is_fresh, wants_lock))
        return piece

    def release(self, piece: RamPiece) -> None:
        """Give a piece up. No copy that reads or writes it may still be under way.

        Its memory may be another one's after this, so the background is waited for, which is done with it in a moment.
        """
        with self._lock:
            piece.is_released = True
            if piece.in_background:
                piece.left = Event()
        if piece.left is not None:
            piece.left.wait()
        self._end(piece)

    def close(self) -> None:
        """End the threads and give up spare memory; nothing is page-locked any more. Idempotent.

        Pieces stay what they are, and more may be had.
        """
        self._background.close()
        self._spare.clear()
        for given_up in (self._returning, self._lingering):
            for key in list(given_up):
                given_up.pop(key, None)
        for pages in list(self._locked.values()):
            self._page_unlock(pages)

    # --- on the caller's thread ---

    def _map(self, size_bytes: int) -> Pages:
        try:
            return Pages.of_size(size_bytes)
        except OSError:
            # Before this fails, what is only kept ready goes.
            spare = self._spare.clear()
            if not spare:
                raise
            for pages in spare:
                self._page_unlock(pages)
            del spare, pages
            return Pages.of_size(size_bytes)

    def _end(self, piece: RamPiece) -> None:
        pages = piece.pages
        if self._background.start() and self._spare.expect_back(pages.size_bytes):
            self._returning[piece.key] = pages
        else:
            self._page_unlock(pages)
        piece.let_go()
        # Whatever takes it out of there has to see to it: this, or the finalizer on any thread.
        if self._returning.pop(piece.key, None) is None:
            return
        # Somebody still refers to it, for how long nobody knows: no room is kept for it meanwhile.
        self._spare.forgo(pages.size_bytes)
        self._lingering[piece.key] = pages
        if piece.key not in self._live:
            self._lingering_ended(piece.key)

    def _ended(self, key: int) -> None:
        """Nothing refers to the memory of a piece any more."""
        self._live.pop(key, None)
        pages = self._returning.pop(key, None)
        if pages is not None:
            self._background.submit(partial(self._wipe_spare, pages))
        else:
            self._lingering_ended(key)

    def _lingering_ended(self, key: int) -> None:
        pages = self._lingering.pop(key, None)
        if pages is not None:
            self._background.submit(partial(self._take_back, pages))

    # --- in the background ---

    def _is_open(self) -> bool:
        return not self._background.is_closed

    def _make_spare(self, size_bytes: int) -> None:
        try:
            pages = Pages.of_size(size_bytes)
        except OSError as error:
            self._spare.forgo(size_bytes)
            log.warning("no %d bytes of RAM to keep ready: %s", size_bytes, error)
            return
        pages.prefer_huge()
        pages.touch(self._is_open)
        self._put_spare(pages)

    def _take_back(self, pages: Pages) -> None:
        if self._spare.expect_back(pages.size_bytes):
            self._wipe_spare(pages)
        else:
            self._page_unlock(pages)

    def _wipe_spare(self, pages: Pages) -> None:
        pages.wipe(self._is_open)
        self._put_spare(pages)

    def _put_spare(self, pages: Pages) -> None:
        if self._page_locked_budget_bytes > 0 and not pages.locked and self._is_open():
            self._page_lock(pages)
        if self._is_open():
            self._spare.put(pages)

    def _settle(self, piece: RamPiece, is_fresh: bool, wants_lock: bool) -> None:
        """Make the pages of a piece that was handed out already, and page-lock it; its contents stay."""
        with self._lock:
            piece.in_background = not piece.is_released
        if not piece.in_background:
            return

        def is_wanted() -> bool:
            return self._is_open() and not piece.is_released

        try:
            if is_fresh:
                piece.pages.touch(is_wanted)
            if wants_lock and is_wanted():
                self._page_lock(piece.pages)
        finally:
            with self._lock:
                piece.in_background = False
            if piece.left is not None:
                piece.left.set()

    # --- page-locking ---

    def _page_lock(self, pages: Pages) -> None:
        size_bytes = pages.size_bytes
        with self._lock:
            if self._page_locked_bytes + size_bytes > self._page_locked_budget_bytes:
                return
            self._page_locked_bytes += size_bytes
        pages.locked = self._device.page_lock(pages.memory())
        if pages.locked:
            self._locked[id(pages)] = pages
            return
        with self._lock:
            self._page_locked_bytes -= size_bytes
            first, self._refused = not self._refused, True
        if first:
            log.warning(
                "%s refused to page-lock %d bytes of RAM; copies go on from ordinary memory, more slowly: raise the "
                "limit of locked memory (ulimit -l) or set budgets.page_locked to 0",
                self._device.name,
                size_bytes,
            )

    def _page_unlock(self, pages: Pages) -> None:
        if self._locked.pop(id(pages), None) is None:
            return
        try:
            self._device.page_unlock(pages.memory())
        except Exception as error:  # the device may be lost; the memory is given up all the same
            log.warning("%s could not unlock %d bytes of RAM: %s", self._device.name, pages.size_bytes, error)
        pages.locked = False
        with self._lock:
            self._page_locked_bytes -= pages.size_bytes


def return_freed_heap() -> None:
    """Ask the C library to give freed heap memory back to the system; where it cannot, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
