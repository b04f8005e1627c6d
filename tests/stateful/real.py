"""The same play with the shipped mover: small torch models on a simulated device, image files on a real disk."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from movers import bits, bumped, same_bits
from stateful.machine import CacheByTasks
from stateful.play import Play
from stateful.reference import INJECTED, Known, Reference
from stateful.stage import Asked, Stage

from modelcache.cache import ModelCache
from modelcache.core.ledger import Room
from modelcache.core.machine import Budgets
from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.mover import TorchMover
from modelcache.errors import MoveError
from modelcache.move import KeptWritten, Move, Moved
from modelcache.testing import SimulatedDevice
from modelcache.testing.arena import Oracle
from modelcache.tier import Tier
from modelcache.wiring import Parts

WIDTH, SEGMENT = 16, 2048
#: What a model takes; room for two of them with a workspace each, and in RAM for three and a half.
SIZE = 6656
VRAM, RAM, DISK = 2 * (SIZE + 600), 7 * SIZE // 2, 1 << 20


class Net(torch.nn.Module):
    """Four layers, a tied head and a buffer: about five kilobytes. Called without anything, it brings its own input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(ord(name))
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.layers[0].weight
        self.register_buffer("shift", torch.empty(WIDTH))
        for tensor in (*self.parameters(), self.shift):
            tensor.requires_grad_(requires_grad=False).copy_(torch.randn(tensor.shape, generator=generator))

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.ones(1, WIDTH, device=self.shift.device) if x is None else x
        return self.head(self.layers(x) + self.shift)


@dataclass(eq=False)
class RealKnown(Known):
    """One registration of a `Net`; its loader may be called again to read its weights."""

    made: list[Net] = field(default_factory=list)

    def load(self) -> Any:
        if self.fails:
            self.fails -= 1
            self.ever_failed = True
            raise ValueError(INJECTED)
        self.made.append(Net(self.name))
        return self.made[-1]


class RealReference(Reference):
    """Contents are the bytes of every tensor; sizes are far enough from the budgets to need no rounding."""

    expected: dict[Any, dict[str, torch.Tensor]]

    def known_as(self, asked: Asked, name: str, model: Any) -> Known:
        found = [known for known in asked.candidates.get(name, ()) if any(model is each for each in known.made)]
        assert found, f"{asked} got a model that was not registered as {name!r} while it waited"
        found[0].model = model
        return found[0]

    def is_excused(self, asked: Asked, error: BaseException, now_s: float) -> bool:
        # What the device was told to fail with says so in words of its own.
        was_told = self.past.faults and isinstance(error, MoveError)
        return was_told or super().is_excused(asked, error, now_s)

    def learn(self, model: Any) -> None:
        known = next(known for known in self.everybody if known.model is model)
        self.expected.setdefault(model, bits(Net(known.name)))

    def require_bytes(self) -> None:
        for held in self.held:
            for model in held.models if held.kind in ("lease", "entered", "task") else ():
                assert same_bits(model, self.expected[model]), f"{held}: the weights have other bytes"
                assert model.head.weight is model.layers[0].weight, f"{held}: no longer tied"


class WatchedMover(TorchMover):
    """The shipped mover, with what a play asks of a `FakeMover`."""

    def __init__(self, faults: Faults, directory: Path) -> None:
        self.device = SimulatedDevice(1 << 20, link_bytes_per_s=None, rounding="exact", faults=faults)
        super().__init__(self.device, segment_bytes=SEGMENT, image_dir=directory)
        self.faults, self.oracle = faults, Oracle()
        self.calls: deque[tuple[str, str]] = deque()

    def move(self, move: Move, progress: Any = None, arriving: Any = None) -> Moved | KeptWritten:
        self.calls.append((move.kind.value, move.part))
        return super().move(move, progress, arriving)

    def load(self, spec: Any, progress: Any = None) -> Any:
        self.calls.append(("load", spec.name))
        return super().load(spec, progress)

    @property
    def held(self) -> Room:
        held = [self.held_bytes(part) for part in tuple(self._parts)]
        return Room(*(sum(getattr(each, tier) for each in held) for tier in ("vram", "ram", "image")))

    @property
    def num_planned(self) -> int:
        return sum(map(len, self.faults._planned.values()))

    def heal(self) -> None:
        for planned in self.faults._planned.values():
            planned.clear()


class RealStage(Stage):
    """A stage over the shipped mover."""

    mover: Any

    def open(self, *, top: Tier = Tier.VRAM, disk: int = DISK, when_full: str, max_waiters: int, **_: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="modelcache-play-"))
        mover = self.mover = WatchedMover(Faults(), self.directory)
        device = mover.device
        self.cache = ModelCache._of(
            Parts(
                budgets=Budgets(RAM, VRAM, disk, top, max_waiters, when_full == "wait"),
                mover=mover,
                clock=self.clock,
                pool=self.pool,
                device_name=device.name,
                execution_device=lambda: device.torch_device,
                measure=lambda: Room(device.free_bytes(), mover.live_ram_bytes),
                close=mover.close,
            )
        )

    def heal(self) -> None:
        self.mover.heal()

    @property
    def is_clear(self) -> bool:
        return not self.mover.num_planned

    def sweep(self) -> None:
        """After the end: no file is left."""
        left = list(self.directory.rglob("*"))
        shutil.rmtree(self.directory)
        assert not left, left


class RealPlay(Play):
    """What differs where the weights are real."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        super().__init__(stage, **options)
        self.reference = RealReference(
            Tier.VRAM, {Tier.VRAM: VRAM, Tier.RAM: RAM}, DISK, options["reject"], options["max_waiters"]
        )
        self.reference.expected = {}

    def _capacities(self) -> dict[Tier, int]:
        return {Tier.VRAM: VRAM, Tier.RAM: RAM}

    def _held(self) -> Room:
        held = self.mover.held
        assert self.mover.device.allocated_bytes() >= held.vram
        return held

    def _parts_of(self, known: Known) -> dict[str, int]:
        loaded = self.mover._models.get(known.name)
        return {part.id: self.mover.held_bytes(part.id).vram for part in (loaded.parts if loaded else ())}

    def write(self, model: Any, part: int, segment: int, data: bytes) -> None:
        name = ("shift", "head.weight", "layers.2.bias")[(part + segment) % 3]
        bumped(model, name, data[0] + 1.0)
        self.reference.expected[model] = bits(model)
        self.reference.past.written = self.reference.past.mutable = True

    def close(self, *, late_s: float = 0.0) -> None:
        super().close(late_s=late_s)
        assert self.mover.device.allocated_bytes() == 0
        assert self.mover.live_ram_bytes == 0
        self.stage.sweep()


MODELS = st.fixed_dictionaries(
    {},
    optional={
        "workspace": st.sampled_from([0, 500]),
        "reload": st.booleans(),
        "concurrency": st.sampled_from([0, 1]),
        "priority": st.sampled_from(["normal", "low", "high"]),
        "idle": st.sampled_from([None, "4s"]),
        "fails": st.sampled_from([0, 0, 1]),
    },
)


class CacheOverTorch(CacheByTasks):
    """Threads and tasks over the shipped mover; the device fails instead of a fake's steps."""

    a_step_will_stand_still = a_step_goes_on = every_step_goes_on = None
    a_step_will_fail = the_device_will_be_full = the_device_will_be_lost = close_and_reopen = None

    @initialize(fleet=st.tuples(MODELS, MODELS, MODELS, MODELS, MODELS), reject=st.sampled_from([False, False, True]))
    def open(self, fleet: tuple[dict[str, Any], ...], reject: bool) -> None:
        if self.stage.is_spoiled:
            self.stage.give_up()
            type(self).stage = RealStage()
        self.stage.is_spoiled = True
        self.fleet = fleet
        self.play = RealPlay(self.stage, top=Tier.VRAM, disk=DISK, reject=reject, max_waiters=512)
        self.reference = self.play.reference
        self._register_fleet()

    def _register(self, name: str, **options: Any) -> None:
        options.pop("sizes", None)
        known = RealKnown(name, {"": (SIZE,)}, **{**options, "sized": False})
        try:
            self.play.register(known)
        except ValueError:
            assert name in self.reference.leaving

    @rule(name=st.sampled_from("abcdef"), options=MODELS)
    def register(self, name: str, options: dict[str, Any]) -> None:
        if name not in self.reference.registered:
            self._register(name, **options)

    @precondition(lambda self: self._free)
    @rule(actor=st.integers(0, 5), share=st.sampled_from([0.1, 0.6, 1.0, 1.0]), tier=st.sampled_from([Tier.VRAM]))
    def resize(self, actor: int, share: float, tier: Tier) -> None:
        size = int(VRAM * share)
        self._ask("resize", (), partial(self.play.cache.resize, **{tier.value: size}), actor=actor)
        self.reference.retarget(tier, size)

    @rule(
        operation=st.sampled_from(["allocate", "copy_in", "copy_out"]),
        nth=st.integers(1, 3),
        failure=st.sampled_from(["transient", "transient", "out_of_memory"]),
    )
    def the_device_will_fail(self, operation: str, nth: int, failure: str) -> None:
        self.reference.past.faults = self.reference.past.kept = True
        self.play.mover.faults.fail(operation, nth=nth, failure=failure)
