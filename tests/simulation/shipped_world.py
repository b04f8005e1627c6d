"""Schedules over the shipped mover: real models of a few kilobytes on a simulated device, image files on a real disk.

Tasks are threads here, one of which runs at a time: torch keeps its modes per thread. After every use of a model each
of its tensors is held against what the loader gave and what was written since.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from simulation.ports import SimClock
from simulation.scheduler import Scheduler
from simulation.stand_ins import data_plane_of
from simulation.strands import ThreadStrand, on_one_processor
from simulation.swizzle import Swizzle
from simulation.tiny import SEGMENT_BYTES, SIZES, WIDTH, Tiny, bytes_of, expected_of, put
from simulation.world import ONCE, Schedule

from modelcache import ModelCache
from modelcache.core.ledger import Room
from modelcache.core.machine import Budgets
from modelcache.dataplane.device.faults import Faults, Operation, Planned
from modelcache.dataplane.device.protocol import DeviceEvent
from modelcache.dataplane.device.simulated_slots import SLOTS
from modelcache.dataplane.mover import TorchMover
from modelcache.errors import MoveError
from modelcache.move import KeptWritten, Move, Moved, MoveKind
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier
from modelcache.wiring import Parts

PAGE_BYTES = 4096
#: What calls may have on the device beside the weights: less than any segment, so that a segment too many is seen.
CALLS_BYTES = SEGMENT_BYTES - 64
#: A lease that is there for longer than this many switches of others is one.
INSTANT_SWITCHES = 500


class SeededFaults(Faults):
    """What the device refuses, drawn from the seed; copies that are held back complete when the swizzle says so."""

    def __init__(self, scheduler: Scheduler, marks: Counter[str], swizzle: Swizzle, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self._scheduler, self._marks, self._swizzle = scheduler, marks, swizzle
        self.kinds = kinds
        self.frequency = 0.0

    def strikes(self, kind: str) -> bool:
        if kind not in self.kinds or self._scheduler.random.random() >= self.frequency:
            return False
        self._marks[f"fault: {kind}"] += 1
        self._scheduler.note(f"meets a fault: {kind}")
        return True

    def next_call(self, operation: Operation) -> tuple[Planned, ...]:
        if operation == "allocate":
            return (Planned(0, failure="out_of_memory"),) if self.strikes("memory") else ()
        if operation in ("copy_in", "copy_out"):
            failure = "transient" if self.strikes(operation) else None
            return (Planned(0, failure=failure, hold=_Held(self._swizzle, operation)),)  # type: ignore[arg-type]
        return ()

    def next_page_lock_is_refused(self) -> bool:
        return self.strikes("page lock")


class _Held:
    """A copy that stands still while completions are held back."""

    def __init__(self, swizzle: Swizzle, what: str) -> None:
        self._swizzle, self._what = swizzle, what

    def stand(self) -> None:
        self._swizzle.stand(self._what)

    def release(self) -> None:
        """The device is closed: what is held back goes on in its time."""


class WatchedMover(TorchMover):
    """The shipped mover; whoever moves what is leased is seen, and completions may be held back."""

    world: ShippedSchedule

    def move(self, move: Move, progress: Any = None, arriving: Callable[[], None] | None = None) -> Moved | KeptWritten:
        world, part = self.world, self._parts.get(move.part)
        world.scheduler.note(f"{move.kind} of {move.part} {move.before} -> {move.after} begins")
        world.before_move(move, () if part is None else tuple(part.policies))
        landed: list[int] = []
        try:
            result = super().move(move, lambda _, done, __: landed.append(done), self._noting(arriving))
        except MoveError:
            world.mark_failure(move, has_landed=bool(landed), is_torn=part is not None and bool(part.torn))
            raise
        world.mark_move(move, result, has_file=part is not None and part.file is not None)
        world.swizzle.stand(str(move.kind))
        return result

    def _noting(self, arriving: Callable[[], None] | None) -> Callable[[], None] | None:
        if arriving is None:
            return None

        def note() -> None:
            self.world.marks["calls let in while weights arrive"] += 1
            arriving()

        return note

    def is_unwritten(self, part: str) -> bool:
        is_clean = super().is_unwritten(part)
        self.world.marks["looked at in the background: " + ("clean" if is_clean else "written, or gone")] += 1
        return is_clean


class WatchedDevice(SimulatedDevice):
    """Counts the operators that had to wait for their weights."""

    marks: Counter[str]

    def let_compute_wait(self, event: DeviceEvent) -> None:
        self.marks["an operator waited for its weights"] += 1
        super().let_compute_wait(event)


@cache
def _folder() -> Path:
    """For the image files of this process; where there is one, in memory."""
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="modelcache-simulation-", dir=shm if os.access(shm, os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class ShippedSchedule(Schedule):
    flag = "--shipped"
    strand = ThreadStrand
    vram, ram, disk = 7 * SEGMENT_BYTES, 9 * PAGE_BYTES, 4 * PAGE_BYTES
    freed, reserved, lowered = 3 * SEGMENT_BYTES, 2 * SEGMENT_BYTES, (4 * SEGMENT_BYTES, 5 * SEGMENT_BYTES)
    healed_by = 1500

    def __init__(self, seed: int, marks: Counter[str] | None = None, *, is_live: bool = False) -> None:
        super().__init__(seed, marks, is_live=is_live)
        draw = self.random
        kinds = ("load", "memory", "copy_in", "copy_out", "disk", "page lock")
        has_faults = is_live or draw.random() < 0.5
        chosen = tuple(kind for kind in kinds if draw.random() < 0.5) * has_faults
        self.faults = SeededFaults(self.scheduler, self.marks, self.swizzle, chosen)
        self.faults.frequency = 0.25 if is_live else 0.1
        self.num_comparisons = 0
        self.violations: list[str] = []
        self._folder = _folder() / "images"
        self._device: WatchedDevice | None = None
        self.mover: WatchedMover | None = None

    @contextmanager
    def stand_ins(self) -> Generator[None]:
        with on_one_processor(), super().stand_ins(), data_plane_of(self.scheduler, self.pool):
            try:
                yield
            finally:
                if self._device is not None and self._device._is_open:
                    # It failed, and nobody is left to end the device's threads: its index is free all the same.
                    SLOTS.release(self._device._index)
                shutil.rmtree(self._folder, ignore_errors=True)

    def make_cache(self) -> ModelCache:
        draw, clock = self.random, SimClock(self.scheduler)
        self._device = device = WatchedDevice(
            self.vram + CALLS_BYTES,
            link_bytes_per_s=draw.choice((None, 1e3, 1e4)),
            faults=self.faults,
            threads=self.pool,
            clock=clock.now_s,
        )
        device.marks = self.marks
        self.mover = mover = WatchedMover(
            device,
            segment_bytes=SEGMENT_BYTES,
            image_dir=self._folder,
            page_locked_bytes=draw.choice((0, 4 * PAGE_BYTES)),
            spare_bytes=draw.choice((0, 0, 2 * PAGE_BYTES)),
            spawn=self.pool.spawn if draw.random() < 0.5 else None,
            now_s=clock.now_s,
            make_lock=self.pool.lock,
        )
        mover.world = self
        files = mover._tiers.files
        assert files is not None
        files._write = self._write_to_disk
        self._ones = torch.empty(1, WIDTH, device=device.torch_device)
        put(self._ones, bytes_of(torch.ones(1, WIDTH)))
        return ModelCache._of(
            Parts(
                budgets=Budgets(
                    ram=self.ram,
                    vram=self.vram,
                    disk=self.disk,
                    top=Tier.VRAM,
                    max_waiters=16,
                    wait_when_full=True,
                    check_after_s=draw.choice((None, 0.25)),
                ),
                mover=mover,
                clock=clock,
                pool=self.pool,
                device_name=device.name,
                execution_device=lambda: device.torch_device,
                measure=lambda: Room(device.free_bytes(), mover.live_ram_bytes),
                close=mover.close,
            )
        )

    def _write_to_disk(self, descriptor: int, data: memoryview) -> int:
        self.scheduler.switch("write to disk")
        if self.faults.strikes("disk"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data[: self.random.choice((len(data), max(1, len(data) // 2)))])

    def register(self, name: str) -> None:
        has_loaded = False

        def load() -> Tiny:
            nonlocal has_loaded
            self.scheduler.switch(f"loads {name}")
            if self.faults.strikes("load"):
                raise RuntimeError("injected into a loader")
            self.marks["loaded again for its bytes" if has_loaded else "loaded"] += 1
            has_loaded = True
            return Tiny(name)

        self.cache.register(name, load, size=SIZES[name], reload=name != ONCE)

    # --- what callers do ------------------------------------------------------------------------------------------

    def work(self, name: str, model: Tiny, hold_s: float) -> None:
        places = {key: tensor.data_ptr() for key, tensor in model.tensors().items()}
        self._call(name, model)
        self.hold(hold_s)
        self.compare(name, model)
        now = {key: tensor.data_ptr() for key, tensor in model.tensors().items()}
        assert now == places, f"{name} moved while it was leased"

    def get(self, name: str, timeout_s: float | None) -> None:
        self.scheduler.note(f"gets {name} within {timeout_s}")
        handle = self.cache.get(name, timeout=timeout_s)
        for again in range(self.random.randint(1, 3)):
            self.scheduler.switch("has a handle")
            self._call(name, handle)
            self.marks["handle used again" if again else "handle used"] += 1
            self.hold(self.random.choice((0.0, 0.5, 2.5)))
        with handle as model:
            self.compare(name, model)

    def _call(self, name: str, model: Any) -> None:
        writes, known = model.writes, dict(model.known)
        result = model(self._ones)
        if writes % 2 == 0 and model.writes == writes:
            assert bytes_of(result) == expected_of(known), f"a call of {name} gave another result"

    def write(self, name: str, model: Tiny) -> None:
        if model.writes % 2:
            return  # somebody else is at it
        key = self.random.choice(sorted(model.known))
        tensor = model.tensors()[key]
        data = self._new_bytes(key, tensor)
        # Until it is over, either is right.
        model.before = {key: model.known[key]}
        model.known[key] = data
        model.writes += 1
        if self.random.random() < 0.7:
            put(tensor, data)
        else:
            flat = torch.frombuffer(bytearray(data), dtype=tensor.dtype)
            with torch.no_grad():
                tensor.copy_(flat.reshape(tensor.shape) if tensor.is_contiguous() else flat.reshape(8, 4).t())
            self.marks["written to by an operator"] += 1
        model.writes += 1
        model.before = {}

    def _new_bytes(self, key: str, tensor: torch.Tensor) -> bytes:
        if not key.startswith("layer"):
            return self.random.randbytes(tensor.numel() * tensor.itemsize)
        data = bytearray(bytes_of(tensor))
        row = self.random.randrange(WIDTH) * WIDTH * 4
        values = torch.tensor(self.random.choices((-1.0, 0.0, 1.0), k=WIDTH))
        data[row : row + WIDTH * 4] = bytes_of(values)
        return bytes(data)

    # --- what must hold -------------------------------------------------------------------------------------------

    def compare(self, name: str, model: Tiny) -> None:
        """Hold every tensor of a leased model against its known bytes."""
        assert model.tied is model.layer0, f"{name} lost a tie"
        for key, tensor in model.tensors().items():
            assert tensor.device == self._device.torch_device, f"{key} of {name} is on {tensor.device}"
            found = bytes_of(tensor)
            self.num_comparisons += 1
            if _hash(found) == _hash(model.known[key]) or found == model.before.get(key):
                continue
            raise AssertionError(f"the bytes of {key} of {name} changed: {_difference(found, model.known[key])}")

    def before_move(self, move: Move, models: tuple[str, ...]) -> None:
        """Nothing that is leased gives anything up."""
        if move.kind not in (MoveKind.TRIM, MoveKind.EVICT):
            return
        leased = self._leases_on(models)
        for _ in range(INSTANT_SWITCHES):
            if not leased:
                return
            # A caller who was refused shows for an instant: let it go on.
            self.scheduler.step_back("look at leases")
            leased &= self._leases_on(models)
        # Kept, and not raised: here it would only be the error of a move.
        self.violations.append(f"{move.kind} of {move.part} while it is leased: {sorted(leased)}")

    def _leases_on(self, models: tuple[str, ...]) -> set[tuple[str, int]]:
        gates = self.cache._driver.gates
        return {(name, tick) for name in models if name in gates for tick in gates[name].open.copy()}

    def mark_move(self, move: Move, result: Moved | KeptWritten, *, has_file: bool) -> None:
        """A move was carried out, or ended where it began because it would have lost writes."""
        self.marks[f"{move.kind} carried out"] += 1
        if isinstance(result, KeptWritten):
            self.marks["kept because written"] += 1
            return
        self.marks["writes were found and kept"] += result.written
        self.marks["an image file was written"] += move.write_image
        self.marks["read from an image file"] += has_file and move.kind is MoveKind.STAGE
        self.marks["dropped with nothing copied"] += not result.copied_bytes and move.kind is MoveKind.TRIM
        self.marks["trimmed in part"] += move.kind is MoveKind.TRIM and move.after.vram > 0
        self.marks["promoted in part before"] += move.kind is MoveKind.PROMOTE and move.before.vram > 0
        self.marks["moved while the cache closes"] += self.is_closing

    def mark_failure(self, move: Move, *, has_landed: bool, is_torn: bool) -> None:
        """A move failed."""
        self.marks[f"{move.kind} fails"] += 1
        self.marks["rolled back after some of it had landed"] += has_landed and move.kind is MoveKind.PROMOTE
        self.marks["its RAM copy was torn"] += is_torn
        self.marks["an image file could not be written"] += move.write_image

    def look(self) -> None:
        assert self.mover is not None
        assert not self.violations, "; ".join(self.violations)
        live_bytes = self.mover.live_ram_bytes
        assert live_bytes <= self.ram, f"{live_bytes} bytes of RAM are held, and {self.ram} may be"

    def heal(self) -> None:
        self.faults.kinds = ()

    def held(self) -> dict[Tier, int]:
        if self.mover is None:
            return dict.fromkeys(Tier, 0)
        held = [self.mover.held_bytes(part) for part in list(self.mover._parts)]
        return {
            Tier.VRAM: sum(each.vram for each in held),
            Tier.RAM: sum(each.ram for each in held),
            Tier.DISK: sum(each.image for each in held),
        }

    def after_the_end(self) -> None:
        assert self._device is not None
        assert self.mover is not None
        del self._ones
        assert self._device.allocated_bytes() == 0, f"{self._device.allocated_bytes()} bytes are left on the device"
        assert self.mover.live_ram_bytes == 0, f"{self.mover.live_ram_bytes} bytes are left in RAM"
        left = [str(path) for path in self._folder.rglob("*")] if self._folder.exists() else []
        assert not left, f"files are left behind: {left}"


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _difference(found: bytes, wanted: bytes) -> str:
    first = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    num = sum(a != b for a, b in zip(found, wanted, strict=True))
    return (
        f"{num} of {len(found)} bytes, from byte {first}: {found[first:][:8].hex()}, and not {wanted[first:][:8].hex()}"
    )
