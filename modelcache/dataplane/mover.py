"""TorchMover: carries out one load or one move, whole or not at all.

Its own part is the table of models and parts, their locks, and the words of errors. `admission.py` lays a model out,
`bringing_up.py` and `giving_up.py` move its parts, `drift.py` looks for what the user changed.

A model without bytes has no parts; nothing of it is ever moved.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from modelcache.dataplane import bringing_up, giving_up
from modelcache.dataplane.admission import Admission
from modelcache.dataplane.arrival import waiting
from modelcache.dataplane.copies import Done, Tiers, give_up
from modelcache.dataplane.device.protocol import Device
from modelcache.dataplane.dispatch.taken_over import TakenOver
from modelcache.dataplane.drift import ends, strays, take_back
from modelcache.dataplane.first_use import Recorder, can_be_recorded, has_compiled
from modelcache.dataplane.image import SEGMENT_BYTES
from modelcache.dataplane.images.files import ImageFiles
from modelcache.dataplane.images.keeping import Keeper
from modelcache.dataplane.images.kept import KeptImages
from modelcache.dataplane.inventory import walk
from modelcache.dataplane.loaded import LoadedModel
from modelcache.dataplane.loading import adapters
from modelcache.dataplane.loading.source import Built
from modelcache.dataplane.memory import blocks
from modelcache.dataplane.memory.background import Spawn
from modelcache.dataplane.parts import Part
from modelcache.dataplane.whereabouts import Whereabouts
from modelcache.dataplane.written import print_of
from modelcache.errors import (
    CacheClosedError,
    DeviceMemoryError,
    InvalidTransitionError,
    LoaderError,
    MaterializeError,
    ModelCacheError,
    MoveError,
    UnknownModelError,
)
from modelcache.move import KeptWritten, LoadedFacts, Move, Moved, MoveKind, PartFacts, Residency
from modelcache.spec import ModelSpec

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """What one part holds now, as the allocators charge it."""

    vram: int
    ram: int
    image: int


class TorchMover:
    """The data plane's `Mover`.

    Calls for different parts may come from several threads at once.

    Args:
        device: Of the top tier; closed with the mover.
        segment_bytes: About how large a segment is.
        image_dir: Where image files go; `None` for no image files.
        disk_bytes: What image files may take; those that outlive the process are kept in what others leave of it.
        page_locked_bytes: How much RAM may be page-locked.
        spare_bytes: How much RAM is kept ready ahead of demand, beside what is held.
        spawn: Starts threads for what is done ahead of demand; `None` does nothing ahead.
        build: Runs a loader; `modelcache.dataplane.loading.loaders.build` when not given.
        now_s: Monotonic seconds.
        make_lock: Where locks come from.
    """

    def __init__(
        self,
        device: Device,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        image_dir: Path | None = None,
        disk_bytes: int = 0,
        page_locked_bytes: int = 0,
        spare_bytes: int = 0,
        spawn: Spawn | None = None,
        build: Callable[[ModelSpec], Built] | None = None,
        now_s: Callable[[], float] = time.perf_counter,
        make_lock: Callable[[], AbstractContextManager[object]] = threading.Lock,
    ) -> None:
        kept = KeptImages(image_dir, disk_bytes, segment_bytes) if image_dir is not None and disk_bytes else None
        files = None if image_dir is None else ImageFiles(image_dir, kept=kept)
        self._kept, self._keeper = kept, None if kept is None else Keeper(kept)
        self._device = device
        ram = blocks.RamBlocks(
            device, page_locked_bytes, spare_bytes=spare_bytes, piece_bytes=segment_bytes, spawn=spawn
        )
        self._tiers = Tiers(device, ram, files)
        self._whereabouts = Whereabouts(make_lock())
        self._admission = Admission(segment_bytes, make_lock, self._whereabouts)
        self._build = build
        self._now_s = now_s
        # Guards the two tables and `_closed`. Taken above the locks of parts while a model is admitted, never below.
        self._admitting = make_lock()
        self._models: dict[str, LoadedModel] = {}
        self._parts: dict[str, Part] = {}
        self._closed = False

    # --- the port ---

    def load(self, spec: ModelSpec, progress: Progress | None = None) -> LoadedFacts:
        """Run the loader once and lay its bytes out in parts; the bytes stay the loader's until staged.

        Raises:
            LoaderError: The loader raised or returned something that cannot be cached.
            MaterializeError: A dispatched model could not be made whole.
            WeightsError: A file is missing, damaged or of an unsupported kind.
            CacheClosedError: The mover was closed.
        """
        self._require_open()
        self._require_new(spec)
        self._tiers.blocks.prepare()
        started = self._now_s()
        with _words_of_loader(spec):
            built = self._run_loader(spec)
            # Before the lock: what cannot be read later is read here, for as long as that takes.
            taken = self._taken_over(spec, built)
            with self._admitting, _plain_tensors():
                try:
                    self._require_open()
                    self._require_new(spec)
                    model = self._admission.admit(spec, Built(built.model, taken.source), taken.dispatch)
                except BaseException:
                    taken.undo()
                    raise
                model.settle_in(self._device.torch_device, self._device.holds_copies)
                if self._keeper is not None:
                    self._keeper.admitted(model, built.keepable)
                self._models[spec.name] = model
                self._parts.update({part.id: part for part in model.parts})
                for part in model.parts:
                    self._whereabouts.enter(part)
        return LoadedFacts(
            parts=tuple(self._facts(part) for part in model.parts),
            concurrency=adapters.default_concurrency(built.model),
            type_name=adapters.type_name(built.model),
            seconds=self._now_s() - started,
            onload_bytes=0 if model.dispatch is None else model.dispatch.onload_bytes,
            whole_only=taken.whole_only,
        )

    def move(
        self, move: Move, progress: Progress | None = None, arriving: Callable[[], None] | None = None
    ) -> Moved | KeptWritten:
        """Carry out one move. A promotion calls `arriving` once calls may start, if they may before it is over.

        Raises:
            MoveError: The move failed; the part is as `move.before` says.
            CacheClosedError: The mover was closed.
        """
        self._require_open()
        part = self._part(move)
        started, allocated = self._now_s(), self._device.allocated_bytes()
        with part.lock, _plain_tensors():
            done = self._carry_out(part, move, progress, arriving)
        if done is None:
            return KeptWritten(self._now_s() - started)
        if move.kind is MoveKind.STAGE and self._keeper is not None:
            self._keeper.staged(part)
        freed = max(0, allocated - self._device.allocated_bytes()) if self._device.holds_copies else None
        return Moved(done.copied_bytes, self._now_s() - started, done.written, freed)

    def is_unwritten(self, part: str) -> bool:
        """Whether a part's bytes on the device are as they were last known, and its models as they were laid out.

        Looks segment by segment, so that a move waits for one of them at most.
        """
        known = self._parts.get(part)
        if known is None or any(strays(model, known) for model in self._holders(known)):
            return False
        for segment in range(known.num_segments):
            with known.lock, _plain_tensors():
                copy = known.vram[segment]
                if copy is not None and (
                    segment in known.torn or print_of(copy, self._tiers) != known.reference[segment]
                ):
                    return False
        return True

    def drop_image(self, part: str) -> None:
        """Delete the image file of a part whose bytes are held elsewhere; nothing to delete is fine.

        A file that is the last to hold them stays.
        """
        known = self._parts.get(part)
        if known is None:
            return
        with known.lock:
            kept = known.file is None or known.file.is_kept
            if known.file is not None and self._tiers.files is not None and not (kept or known.needs_file):
                self._tiers.files.delete(known.file)
                known.file = None

    def forget(self, name: str) -> None:
        """Let go of everything known of a model, parts included unless another model holds them.

        Its tensors become empty, except those that the loader still has, and it says so instead of running, being saved
        or being copied. Unknown names are fine.
        """
        with self._admitting:
            model = self._models.pop(name, None)
        if model is None:
            return
        # First of all: a stray forward must not meet tensors that become empty.
        model.refuse("the cache was closed" if self._closed else "it was unregistered")
        with contextlib.suppress(ValueError), model.lock:  # what the user patched stays patched
            if model.dispatch is not None:
                model.dispatch.take_off()
        adapters.restore(model.model, model.idea)
        emptied: list[torch.Tensor] = []
        for part in model.parts:
            with part.lock, _plain_tensors():
                emptied += part.leave(name)
                if not part.policies:
                    self._drop(part)
        model.unguard(emptied)

    def object_of(self, name: str) -> object:
        """The object the loader built; the same one for the whole life of the registration.

        Raises:
            UnknownModelError: It is not loaded.
        """
        model = self._models.get(name)
        if model is None:
            raise UnknownModelError(name, num_registered=len(self._models))
        return model.model

    def call(self, name: str) -> AbstractContextManager[None]:
        """Around a call of a model that had to ask for its lease: waits for what arrives, or notes what is read."""
        model = self._models.get(name)
        if model is None or not self._device.holds_copies:
            return contextlib.nullcontext()
        arrivals = [arrival for part in model.parts if (arrival := part.arrival) is not None]
        if arrivals:
            return waiting(arrivals)
        if model.first_use is not None or model.dispatch is not None or has_compiled():
            return contextlib.nullcontext()
        return _recorded(model)

    def settle(self, name: str) -> None:
        """Block until what is arriving of a model has landed or failed; no-op where nothing is."""
        model = self._models.get(name)
        for part in model.parts if model is not None else ():
            if (arrival := part.arrival) is not None:
                with contextlib.suppress(MoveError):
                    arrival.wait()

    def has_bytes(self, name: str) -> bool:
        """Whether every tensor of a model has its bytes; False for one that is not loaded."""
        model = self._models.get(name)
        return model is not None and all(root.guard.has_bytes for root in model.roots)

    def release_cached(self) -> None:
        """Give the allocators' cached memory back: the device's to the driver, the C library's to the system."""
        if self._device.holds_copies:
            self._device.release_cached()
        blocks.return_freed_heap()

    def close(self, in_use: Collection[str] = ()) -> None:
        """Give up everything: memory, files, threads, device state. Idempotent.

        The memory of models that are `in_use` is their tensors' own from now on, and goes with the last of them.
        """
        with self._admitting:
            self._closed = True
        if self._keeper is not None:
            self._keeper.close()
        for name in [each for each in self._models if each not in in_use]:
            self.forget(name)
        for name in list(self._models):
            self._leave_whole(name)
        if self._tiers.files is not None:
            self._tiers.files.close()
        self._tiers.blocks.close()
        self._device.close()

    # --- looking ---

    def held_bytes(self, part: str) -> HeldBytes:
        """What a part holds now; zeros for one that is not known."""
        known = self._parts.get(part)
        if known is None:
            return HeldBytes(0, 0, 0)
        vram = sum(self._device.charge_bytes(copy.memory.numel()) for copy in known.vram if copy is not None)
        ram = sum(copy.piece.size_bytes for copy in known.ram if copy is not None and copy.piece is not None)
        return HeldBytes(vram, ram, known.file.size_bytes if known.file is not None and not known.file.is_kept else 0)

    def residency(self, part: str) -> Residency:
        """Which segments of a part the tiers hold, as the data plane knows it."""
        return self._parts[part].residency

    @property
    def live_ram_bytes(self) -> int:
        """RAM mapped for pieces, those included that were given up but that somebody's tensors keep alive."""
        return self._tiers.blocks.live_bytes

    @property
    def page_locked_bytes(self) -> int:
        """RAM that is page-locked."""
        return self._tiers.blocks.page_locked_bytes

    # --- loading ---

    def _run_loader(self, spec: ModelSpec) -> Built:
        if self._build is None:
            from modelcache.dataplane.loading.loaders import build

            self._build = partial(build, kept=self._kept)
        return self._build(spec)

    def _taken_over(self, spec: ModelSpec, built: Built) -> TakenOver:
        if not _is_dispatched(built):
            return TakenOver(built.source, None)
        modules = {id(each) for module in adapters.modules_of(built.model).values() for each in module.modules()}
        with self._admitting:
            models = list(self._models.items())
        for name, model in models:
            # Somebody may be inside of it: its hooks must not even be touched.
            if any(id(each) in modules for module in model.modules.values() for each in module.modules()):
                problem = f"returned a dispatched model that is, in whole or in part, {name!r}; register it once"
                raise LoaderError(spec.name, str(spec.loader), problem)
        roots = adapters.modules_of(built.model)
        self._admission.require_free(spec, roots, walk(roots))
        from modelcache.dataplane.dispatch.dispatched import take_over

        return take_over(built.model, built.source, self._device, name=spec.name)

    def _facts(self, part: Part) -> PartFacts:
        sizes = [segment.size_bytes for segment in part.image.segments]
        holds = self._device.holds_copies
        return PartFacts(
            part=part.id,
            vram_bytes=tuple(self._device.charge_bytes(size) if holds else 0 for size in sizes),
            ram_bytes=tuple(blocks.charge_bytes(size) for size in sizes),
            image_bytes=ImageFiles.size_bytes(part.contents),
            readable=part.restorable_from_source,
            offloaded=part.is_offloaded,
        )

    # --- moving ---

    def _carry_out(
        self, part: Part, move: Move, progress: Progress | None, arriving: Callable[[], None] | None
    ) -> Done | None:
        if part.residency != move.before or not _is_sound(move):
            state = f"residency {part.residency}"
            raise InvalidTransitionError(f"part {part.id!r}", state, f"{move.kind} {move.before} -> {move.after}")
        holders = self._holders(part)

        def then() -> None:
            self._settle(holders)

        source, target = ends(move)
        if part.arrival is not None:
            part.arrival.forget()
            part.arrival = None
        try:
            done = self._run(part, move, holders, _teller(part, move, progress), then, arriving)
            if done is None:
                then()
        except BaseException as error:
            problem, story = _seen(error)
            # The part points at its old copies again; guards and devices follow it.
            with contextlib.suppress(Exception):
                then()
            if isinstance(error, ModelCacheError) or not isinstance(error, Exception):
                raise
            if isinstance(error, torch.OutOfMemoryError):
                raise self._out_of_memory(part, move) from error
            # Without a name here: it refers to this frame, and both would wait for the garbage collector.
            raise _with_note(MoveError(part.model, source, target, problem), story) from error
        return done

    def _run(
        self,
        part: Part,
        move: Move,
        holders: list[LoadedModel],
        tell: Callable[[int], None],
        then: Callable[[], None],
        arriving: Callable[[], None] | None,
    ) -> Done | None:
        if move.kind is MoveKind.PROMOTE:
            early = None if arriving is None else _early(holders, part, arriving)
            # Nearly always nothing has strayed, which is found out while the copies are under way.
            with contextlib.suppress(bringing_up.StrayedError):
                return bringing_up.promote(
                    part,
                    move,
                    self._tiers,
                    tell,
                    then,
                    lambda: move.check and any(strays(m, part) for m in holders),
                    early,
                )
        for model in holders if move.check else ():
            take_back(model, part, move)
        match move.kind:
            case MoveKind.STAGE:
                return bringing_up.stage(part, move, self._tiers, tell, then)
            case MoveKind.PROMOTE:
                return bringing_up.promote(part, move, self._tiers, tell, then, lambda: False)
            case MoveKind.TRIM:
                return giving_up.trim(part, move, self._tiers, tell, then)
            case MoveKind.SHED:
                return giving_up.shed(part, move, self._tiers, then)
            case MoveKind.EVICT:
                return giving_up.evict(part, move, self._tiers, tell, then)

    def _holders(self, part: Part) -> list[LoadedModel]:
        return [model for name in list(part.policies) if (model := self._models.get(name)) is not None]

    def _settle(self, holders: Iterable[LoadedModel]) -> None:
        for model in holders:
            model.settle_in(self._device.torch_device, self._device.holds_copies)

    def _out_of_memory(self, part: Part, move: Move) -> DeviceMemoryError:
        segments = part.image.segments[move.before.vram : move.after.vram]
        needed = sum(self._device.charge_bytes(segment.size_bytes) for segment in segments)
        free_bytes = None
        with contextlib.suppress(Exception):  # the figure is for people; the refusal is the news
            free_bytes = self._device.free_bytes()
        return DeviceMemoryError(part.model, self._device.name, needed, free_bytes)

    # --- the tables ---

    def _part(self, move: Move) -> Part:
        part = self._parts.get(move.part)
        if part is None:
            raise MoveError(move.part, *ends(move), "the data plane does not know this part (any more)")
        return part

    def _leave_whole(self, name: str) -> None:
        """Forget a model that somebody may be computing with, and touch none of its tensors."""
        model = self._models.pop(name)
        model.unguard()
        for part in model.parts:
            with part.lock:
                del part.policies[name]
                if not part.policies:
                    self._drop(part, is_read=True)

    def _drop(self, part: Part, *, is_read: bool = False) -> None:
        """Give up all of a part that no model holds; its lock is held. `is_read`: but not from below its tensors."""
        self._whereabouts.leave(part)
        copies = [copy for copy in (*part.vram, *part.ram) if copy is not None]
        part.vram, part.ram = [None] * part.num_segments, [None] * part.num_segments
        for copy in copies:
            # A piece of RAM outlives being given up for as long as anything refers to it; mapped memory would not.
            if copy.piece is not None or not is_read:
                give_up(self._tiers, copy)
        if part.file is not None and self._tiers.files is not None:
            self._tiers.files.delete(part.file)
            part.file = None
        if self._keeper is not None:
            self._keeper.forget(part)
        part.residue.clear()
        part.ranges.clear()
        self._parts.pop(part.id, None)

    def _require_new(self, spec: ModelSpec) -> None:
        if spec.name in self._models:
            raise InvalidTransitionError(repr(spec.name), "LOADED", "load")

    def _require_open(self) -> None:
        if self._closed:
            raise CacheClosedError


@contextlib.contextmanager
def _words_of_loader(spec: ModelSpec) -> Iterator[None]:
    """What a loader raises, or what its object does when it is looked at, as a `LoaderError` with its cause."""
    try:
        yield
    except MaterializeError as error:
        error.add_note(f"It is the model registered as {spec.name!r}.")
        raise
    except ModelCacheError:
        raise
    except Exception as error:  # loaders and their objects are user code and may raise anything
        raise LoaderError(spec.name, str(spec.loader), f"raised {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Whatever mode the caller is in, tensors made inside can be written to later and have no history."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


@contextlib.contextmanager
def _recorded(model: LoadedModel) -> Iterator[None]:
    modules = list(model.modules.values())
    if not all(can_be_recorded(module) for module in modules):
        yield
        return
    with Recorder(modules) as recorder:
        yield
    model.first_use = recorder.found()


def _early(holders: list[LoadedModel], part: Part, arriving: Callable[[], None]) -> bringing_up.Early | None:
    uses = [model.first_use for model in holders if model.first_use is not None]
    if len(uses) < len(holders) or has_compiled():
        return None
    roots = [root for model in holders for root in model.roots if part in root.parts]
    return bringing_up.Early(uses, roots, arriving)


def _with_note(error: MoveError, story: str) -> MoveError:
    error.add_note(f"The cause, as it was raised:\n{story}")
    return error


def _is_sound(move: Move) -> bool:
    """Whether the move leaves every segment somewhere, and no tier grows while another one shrinks past it."""
    before, after, n = move.before, move.after, move.num_segments
    if not (0 <= after.vram <= n and 0 <= after.ram <= n):
        return False
    if move.kind is MoveKind.STAGE:
        return before.vram == 0
    if move.kind is MoveKind.PROMOTE:
        return before.ram <= before.vram and before.ram <= after.ram <= after.vram
    return after.ram <= after.vram or move.kind is MoveKind.EVICT


def _teller(part: Part, move: Move, progress: Progress | None) -> Callable[[int], None]:
    """Adds up bytes for a progress port."""
    if progress is None:
        return lambda _size_bytes: None
    total = _total_bytes(part, move)
    done = 0

    def tell(size_bytes: int) -> None:
        nonlocal done
        done = min(done + size_bytes, total)
        progress(part.model, done, total)

    return tell


def _total_bytes(part: Part, move: Move) -> int:
    segments = part.image.segments
    match move.kind:
        case MoveKind.PROMOTE:
            moving = segments[move.before.vram : move.after.vram]
        case MoveKind.STAGE:
            moving = segments[move.after.ram : move.before.ram]
        case MoveKind.TRIM:
            moving = segments[min(move.after.vram, move.after.ram) : move.before.vram]
        case _:
            moving = segments
    return sum(segment.size_bytes for segment in moving)


def _seen(error: BaseException) -> tuple[str, str]:
    """The words of an error, and its traceback as text: its frames are let go, with the memory that they hold."""
    story = "".join(traceback.format_exception(error)).rstrip()
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        # What a function made inside of one has from there is not cleared with it.
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return f"{type(error).__name__}: {error}", story


def _is_dispatched(built: Built) -> bool:
    """Whether a library keeps tensors elsewhere; those on meta that the source fills itself are no sign of it."""
    try:
        modules = adapters.modules_of(built.model).values()
    except TypeError:
        return False  # no known kind of object; its admission says so in better words
    has_hooks = any("_hf_hook" in each.__dict__ for module in modules for each in module.modules())
    has_meta = any(tensor.is_meta for module in modules for tensor in (*module.parameters(), *module.buffers()))
    if not has_hooks and not (has_meta and built.source is None):
        return False
    from modelcache.dataplane.materialize.entry_points import is_dispatched

    return is_dispatched(built.model)
