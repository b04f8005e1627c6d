"""A data plane over plain bytes: it keeps the promises of a `Mover`, and notices when a cache breaks one of its own.

What it does with writes, image files and failed moves is what the real one does: both pass one contract suite.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from modelcache.core.ledger import Room
from modelcache.errors import (
    CacheClosedError,
    InvalidTransitionError,
    LoaderError,
    ModelCacheError,
    MoveError,
    UnknownModelError,
)
from modelcache.move import KeptWritten, LoadedFacts, Move, Moved, MoveKind, PartFacts, Residency
from modelcache.runtime.ports import Progress
from modelcache.spec import ModelSpec, OnWrite
from modelcache.testing import moves
from modelcache.testing.arena import Arenas, Oracle
from modelcache.testing.models import FakeModel, FakePart
from modelcache.testing.time_and_threads import FakePool, Hold
from modelcache.tier import Tier

#: What can be held or failed: loads, the kinds of moves, and what ends a part's life.
STEPS = ("load", *(kind.value for kind in MoveKind), "drop_image", "forget")
#: A refused caller shows at a gate for an instant; a lease that is still there after this long is one.
_INSTANT_S = 1.0


@dataclass(frozen=True, slots=True)
class FakeHeld:
    """What one part holds now."""

    vram: int
    ram: int
    image: int


@dataclass(slots=True)
class _Planned:
    """What happens to one of the coming steps."""

    step: str
    name: str | None
    left: int
    hold: Hold | None = None
    error: BaseException | None = None


class FakeMover:
    """A `Mover` for `FakeModel` objects.

    Broken promises are kept in `oracle`; ask it at the end of every test: `mover.oracle.require_nothing()`.

    Args:
        pool: Where its steps stand still; a pool of its own when not given.
        vram_bytes: The memory of each tier; more is never held.
        top: `Tier.RAM` for a machine without an accelerator.

    Attributes:
        calls: What was asked of it, in order: (step, model or part).
        leases_of: Tells the leases that are open on a model, for the oracle; set by `cache_of`.
        num_released: How often cached memory was given back.
    """

    def __init__(
        self,
        pool: FakePool | None = None,
        *,
        vram_bytes: int = 1 << 20,
        ram_bytes: int = 1 << 20,
        disk_bytes: int = 1 << 20,
        top: Tier = Tier.VRAM,
    ) -> None:
        self.pool = pool if pool is not None else FakePool()
        self.top = top
        self.oracle = Oracle()
        self.arenas = Arenas(vram_bytes=vram_bytes, ram_bytes=ram_bytes, disk_bytes=disk_bytes, oracle=self.oracle)
        self.calls: deque[tuple[str, str]] = deque()
        self.num_released = 0
        self.leases_of: Callable[[str], Collection[int]] = lambda _name: ()
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []
        self._models: dict[str, FakeModel] = {}
        self._parts: dict[str, FakePart] = {}
        self._loading: dict[str, object] = {}
        self._moving: dict[str, object] = {}
        self._closed = False

    # --- scripts ---

    def hold(self, step: str, name: str | None = None, *, nth: int = 1) -> Hold:
        """Let the `nth` such step from now (of one model, or of any) stand still, its new bytes allocated."""
        hold = self.pool.hold()
        self._plan(_Planned(step, name, nth, hold=hold))
        return hold

    def fail(self, step: str, error: BaseException | None = None, name: str | None = None, *, nth: int = 1) -> None:
        """Let the `nth` such step from now (of one model, or of any) fail; with a `MoveError` if no error is given."""
        self._plan(_Planned(step, name, nth, error=error or MoveError(name or "a model", "here", "there", "injected")))

    def _plan(self, planned: _Planned) -> None:
        if planned.step not in STEPS:
            raise ValueError(f"unknown step {planned.step!r}; choose one of {', '.join(STEPS)}")
        with self._lock:
            self._planned.append(planned)

    def _reach(self, step: str, names: Collection[str]) -> None:
        """Stand still, and fail, as it was planned for this step."""
        due: list[_Planned] = []
        with self._lock:
            for planned in self._planned:
                if planned.step == step and (planned.name is None or planned.name in names):
                    planned.left -= 1
                    if not planned.left:
                        due.append(planned)
            self._planned = [planned for planned in self._planned if planned.left > 0]
        for planned in due:
            if planned.hold is not None:
                planned.hold.stand()
        for planned in due:
            if planned.error is not None:
                raise planned.error

    # --- the port ---

    def load(self, spec: ModelSpec, progress: Progress | None = None) -> LoadedFacts:
        """Run the loader once; the bytes stay the loader's until staged.

        Raises:
            LoaderError: The loader raised or returned something that is no `FakeModel`.
            CacheClosedError: The mover was closed.
        """
        self._begin("load", spec.name)
        if spec.name in self._models:
            raise InvalidTransitionError(repr(spec.name), "LOADED", "load")
        if self._loading.setdefault(spec.name, token := object()) is not token:
            raise self.oracle.refuse(f"{spec.name!r} is loaded twice at a time")
        try:
            self._reach("load", (spec.name,))
            model = self._run_loader(spec)
            with self._lock:
                self._require_open()
                self._admit(spec, model)
                self._models[spec.name] = model
        finally:
            del self._loading[spec.name]
        return LoadedFacts(tuple(self._facts(part) for part in model.parts), model.concurrency, "FakeModel")

    def _run_loader(self, spec: ModelSpec) -> FakeModel:
        call = spec.loader.call
        assert callable(call), "a FakeMover calls loaders that are callables"
        try:
            model: Any = call()
        except ModelCacheError:
            raise
        except Exception as error:  # A loader is user code and may raise anything.
            raise LoaderError(spec.name, str(spec.loader), f"raised {type(error).__name__}: {error}") from error
        if not isinstance(model, FakeModel) or model.name:
            what = f"the FakeModel of {model.name!r}" if isinstance(model, FakeModel) else type(model).__name__
            raise LoaderError(spec.name, str(spec.loader), f"returned {what}, and a new FakeModel is wanted")
        return model

    def _admit(self, spec: ModelSpec, model: FakeModel) -> None:
        model.name, model.top = spec.name, self.top
        parts = []
        for label, sizes in model.sizes_by_label.items():
            part = self._parts.get(label) if label else None
            if part is None:
                part = FakePart(label or f"{spec.name}#0", sizes, is_readable=spec.reload)
                part.on_write = spec.on_write
                self._parts[part.part] = part
            part.models[spec.name] = model
            parts.append(part)
        model.parts = tuple(parts)

    def _facts(self, part: FakePart) -> PartFacts:
        vram = part.sizes if self.top is Tier.VRAM else (0,) * part.num_segments
        return PartFacts(part.part, vram, part.sizes, sum(part.sizes), part.is_readable and not part.has_diverged)

    def move(
        self, move: Move, progress: Progress | None = None, arriving: Callable[[], None] | None = None
    ) -> Moved | KeptWritten:
        """Carry out one move. Calls of a `FakeModel` wait for nothing, so `arriving` is not called.

        Raises:
            MoveError: The move failed; the part is as `move.before` says.
            CacheClosedError: The mover was closed.
        """
        self._begin(move.kind.value, move.part)
        part = self._parts.get(move.part)
        if part is None:
            raise MoveError(move.part, "here", "there", "the data plane does not know this part (any more)")
        if self._moving.setdefault(move.part, token := object()) is not token:
            raise self.oracle.refuse(f"{move.part} moves twice at a time")
        try:
            self._require_unused(part, move)
            if part.residency != move.before:
                state = f"residency {part.residency}"
                raise InvalidTransitionError(f"part {move.part!r}", state, f"{move.kind} from {move.before}")
            return self._carry_out(part, move, progress)
        finally:
            del self._moving[move.part]

    def is_unwritten(self, part: str) -> bool:
        """Whether nothing of a part on the top tier was written to."""
        self._begin("is_unwritten", part)
        self._reach("is_unwritten", (part,))
        known = self._parts.get(part)
        return known is not None and not known.written

    def drop_image(self, part: str) -> None:
        """Delete the image file of a part, unless nothing else holds its bytes."""
        self._begin("drop_image", part)
        self._reach("drop_image", (part,))
        known = self._parts.get(part)
        if known is not None and known.image is not None and known.bytes_of(0) is not None:
            known.image = None
            self.arenas.give(Room(disk=sum(known.sizes)), part)

    def forget(self, name: str) -> None:
        """Let go of everything known of a model, parts included unless another model holds them."""
        self._begin("forget", name)
        self._reach("forget", (name,))
        with self._lock:
            model = self._models.pop(name, None)
        for part in model.parts if model is not None else ():
            del part.models[name]
            if not part.models:
                self._drop(part)

    def object_of(self, name: str) -> FakeModel:
        """The object the loader built.

        Raises:
            UnknownModelError: It is not loaded.
        """
        model = self._models.get(name)
        if model is None:
            raise UnknownModelError(name, num_registered=len(self._models))
        return model

    def call(self, name: str) -> AbstractContextManager[None]:
        """Nothing: a `FakeModel` waits for nothing."""
        return nullcontext()

    def settle(self, name: str) -> None:
        """Nothing arrives early."""

    def has_bytes(self, name: str) -> bool:
        """Whether all bytes of a model are in memory."""
        model = self._models.get(name)
        return model is not None and all(p.bytes_of(i) is not None for p in model.parts for i in range(p.num_segments))

    def release_cached(self) -> None:
        """Count that it was asked for."""
        self.num_released += 1

    def close(self, in_use: Collection[str] = ()) -> None:
        """Give up everything; models that are `in_use` keep their bytes, which are theirs from now on. Idempotent."""
        self._closed = True
        kept = {part.part for name in in_use if name in self._models for part in self._models[name].parts}
        for model in list(self._models.values()):
            for part in model.parts:
                part.models.pop(model.name, None)
                self._drop(part, is_kept=part.part in kept)
        self._models.clear()
        self._parts.clear()
        if self.arenas.held:
            raise self.oracle.refuse(f"bytes are left behind: {self.arenas.held}")

    # --- looking ---

    def held_bytes(self, part: str) -> FakeHeld:
        """What a part holds now; zeros for one that is not known."""
        known = self._parts.get(part)
        if known is None:
            return FakeHeld(0, 0, 0)
        room = self._room(known, known.residency)
        return FakeHeld(room.vram, room.ram, sum(known.sizes) if known.image is not None else 0)

    def residency(self, part: str) -> Residency:
        """Which segments of a part the tiers hold."""
        return self._parts[part].residency

    def measure(self) -> Room:
        """Free bytes of the device, and RAM held."""
        vram = self.arenas.of[Tier.VRAM]
        return Room(vram.capacity_bytes - vram.held_bytes, self.arenas.of[Tier.RAM].held_bytes)

    def num_calls(self, step: str, name: str | None = None) -> int:
        """How often a step was asked for."""
        return sum(each == step and name in (None, of) for each, of in self.calls.copy())

    # --- the oracle ---

    def _begin(self, step: str, what: str) -> None:
        self.calls.append((step, what))
        if self.pool.is_locked_here:
            raise self.oracle.refuse(f"{step} of {what} is called with a lock of the cache held")
        self._require_open()

    def _require_open(self) -> None:
        if self._closed:
            raise CacheClosedError

    def _require_unused(self, part: FakePart, move: Move) -> None:
        for name, model in part.models.copy().items():
            if model.running:
                raise self.oracle.refuse(f"{move.kind} of {part.part} while {name!r} is in use")
            leases = set(self.leases_of(name))
            until_s = time.monotonic() + _INSTANT_S
            while leases and time.monotonic() < until_s:
                leases &= set(self.leases_of(name))
            if leases:
                raise self.oracle.refuse(f"{move.kind} of {part.part} while {name!r} is leased: {sorted(leases)}")

    # --- moves: the new bytes are allocated first, the old ones freed last ---

    def _carry_out(self, part: FakePart, move: Move, progress: Progress | None) -> Moved | KeptWritten:
        dirty = part.written if move.check or move.write_image else set()
        if move.kind is MoveKind.TRIM:
            dirty &= set(range(move.after.vram, move.before.vram))
        if move.kind is MoveKind.SHED:
            dirty = set()
        gives_up = move.kind in (MoveKind.TRIM, MoveKind.EVICT)
        if gives_up and dirty and part.on_write is OnWrite.REFUSE:
            return KeptWritten(0.0)
        if move.kind is MoveKind.EVICT and move.check and not move.write_image and not moves.is_on_disk(part, dirty):
            return KeptWritten(0.0)
        held, kept = self._room(part, move.before), self._room(part, move.after)
        writes_image = move.write_image and part.image is None
        needs = Room(max(0, kept.vram - held.vram), max(0, kept.ram - held.ram), sum(part.sizes) * writes_image)
        self.arenas.take(needs, part.part)
        try:
            self._reach(move.kind.value, part.models)
            copied = self._copy(part, move, dirty)
        except BaseException:
            self.arenas.give(needs, part.part)
            raise
        self.arenas.give(Room(max(0, held.vram - kept.vram), max(0, held.ram - kept.ram)), part.part)
        if progress is not None:
            progress(next(iter(part.models), part.part), copied, copied)
        written = bool(dirty) and gives_up and part.on_write is OnWrite.WRITEBACK
        part.has_diverged |= written
        return Moved(copied, 0.0, written, max(0, held.vram - kept.vram))

    def _copy(self, part: FakePart, move: Move, dirty: set[int]) -> int:
        match move.kind:
            case MoveKind.STAGE:
                return moves.stage(part)
            case MoveKind.PROMOTE:
                return moves.promote(part, move)
            case MoveKind.TRIM:
                return moves.trim(part, move, dirty)
            case MoveKind.SHED:
                part.ram[: move.after.ram] = [None] * move.after.ram
                return 0
            case MoveKind.EVICT:
                return moves.evict(part, move)

    def _room(self, part: FakePart, where: Residency) -> Room:
        vram = sum(part.sizes[: where.vram]) if self.top is Tier.VRAM else 0
        return Room(vram, sum(part.sizes[where.ram :]))

    def _drop(self, part: FakePart, *, is_kept: bool = False) -> None:
        if self._parts.pop(part.part, None) is None:
            return
        held = self._room(part, part.residency)
        self.arenas.give(Room(held.vram, held.ram, sum(part.sizes) * (part.image is not None)), part.part)
        if is_kept:
            return
        n = part.num_segments
        part.vram, part.ram, part.image, part.with_loader = [None] * n, [None] * n, None, None
