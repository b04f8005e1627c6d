"""A mover over a simulated device, with what its tests ask again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.loading.adapters import named_tensors
from modelcache.dataplane.loading.source import Built
from modelcache.dataplane.mover import HeldBytes, TorchMover
from modelcache.move import KeptWritten, LoadedFacts, Move, Moved, PartFacts, Residency
from modelcache.spec import LoaderSpec, ModelSpec, OnWrite

_generation = count(1)


class TensorSource:
    """A source that reads from tensors in memory, as a file would give them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.fills = 0

    def describe(self) -> str:
        return "weights.test"

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def fill(self, targets, report=None, landed=None) -> None:
        self.fills += 1
        for name, target in targets.items():
            assert target.is_contiguous()
            target.copy_(self.tensors[name])
            if report is not None:
                report(target.numel() * target.element_size())


class Rig:
    """A mover, its device and the parts it was asked to load."""

    def __init__(
        self, tmp_path: Path, *, capacity: int = 1 << 26, segment_bytes: int = 4096, files: bool = True, **options
    ):
        self.faults = Faults()
        self.device = SimulatedDevice(capacity, link_bytes_per_s=None, rounding="exact", faults=self.faults)
        self.sources: dict[str, TensorSource] = {}
        self.directory = tmp_path / "images"
        self.mover = TorchMover(
            self.device,
            segment_bytes=segment_bytes,
            image_dir=self.directory if files else None,
            build=options.pop("build", self.build),
            **options,
        )
        self.facts: dict[str, PartFacts] = {}

    def build(self, spec: ModelSpec) -> Built:
        model = spec.loader.call()
        if spec.reload:
            source = TensorSource(named_tensors(model))
            self.sources[spec.name] = source
            return Built(model, source)
        return Built(model, None)

    def load(
        self,
        make: Callable[[], object],
        name: str = "m",
        *,
        on_write: OnWrite = OnWrite.WRITEBACK,
        readable: bool = False,
    ) -> LoadedFacts:
        facts = self.mover.load(ModelSpec(name, LoaderSpec(call=make), reload=readable, on_write=on_write))
        self.facts.update({part.part: part for part in facts.parts})
        return facts

    def n(self, part: str) -> int:
        return len(self.facts[part].ram_bytes)

    def move(self, part: str, vram: int, ram: int, *, progress=None, **options) -> Moved | KeptWritten:
        """Bring a part to a residency; the books are checked afterwards, whatever happened."""
        before = self.mover.residency(part)
        move = Move(part, next(_generation), before, Residency(vram, ram), self.n(part), **options)
        moved = None
        try:
            moved = self.mover.move(move, progress)
        finally:
            kept = before if not isinstance(moved, Moved) else Residency(vram, ram)
            assert self.mover.residency(part) == kept
            self.check_books()
        return moved

    def stage(self, part: str):
        return self.move(part, 0, 0)

    def promote(self, part: str):
        return self.move(part, self.n(part), self.mover.residency(part).ram)

    def promote_quietly(self, part: str) -> None:
        """Promote while tensors of the test are on the device too."""
        where, n = self.mover.residency(part), self.n(part)
        self.mover.move(Move(part, next(_generation), where, Residency(n, where.ram), n))

    def park_quietly(self, part: str) -> None:
        """Park while tensors of the test are on the device too."""
        self.mover.move(Move(part, next(_generation), self.mover.residency(part), Residency(0, 0), self.n(part)))

    def park(self, part: str, **options):
        return self.move(part, 0, 0, **options)

    def spill(self, part: str, **options):
        return self.move(part, 0, self.n(part), write_image=True, **options)

    def drop(self, part: str, **options):
        return self.move(part, 0, self.n(part), **options)

    def check_books(self) -> None:
        """What is held is what the facts charge, to the byte, on the device too."""
        vram = ram = 0
        for part, facts in self.facts.items():
            held, where = self.mover.held_bytes(part), None
            try:
                where = self.mover.residency(part)
            except KeyError:
                assert held == HeldBytes(0, 0, 0)
                continue
            assert held.vram == sum(facts.vram_bytes[: where.vram])
            assert held.ram == sum(facts.ram_bytes[where.ram :])
            assert held.image in (0, facts.image_bytes)
            vram, ram = vram + held.vram, ram + held.ram
        assert self.device.allocated_bytes() == vram

    @property
    def ram_bytes(self) -> int:
        return sum(self.mover.held_bytes(part).ram for part in self.facts)

    def close(self) -> None:
        self.mover.close()
        if self.device.allocated_bytes() or self.mover.live_ram_bytes:
            gc.collect()
        assert self.device.allocated_bytes() == 0
        assert self.mover.live_ram_bytes == 0
        assert self.device.page_locked_bytes == 0
        assert not self.directory.exists() or not list(self.directory.iterdir()), "files were left behind"


def bits(model: object) -> dict[str, torch.Tensor]:
    """The bytes of every tensor, on the CPU."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()
        for name, tensor in named_tensors(model).items()
    }


def same_bits(model: object, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a model's tensors have exactly these bytes, NaN payloads included."""
    found = bits(model)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Odd(torch.nn.Module):
    """Ties, views of one storage, strides, offsets, small types, scalars, empty tensors, buffers of both kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.embed = torch.nn.Embedding(30, 16, _weight=random(30, 16))
        self.head = torch.nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        qkv = random(48, 16)
        self.q, self.k, self.v = (torch.nn.Parameter(qkv[i * 16 : (i + 1) * 16]) for i in range(3))
        self.transposed = torch.nn.Parameter(random(16, 24).t())
        self.tiny = torch.nn.Parameter(random(37).to(torch.bfloat16))
        self.conv = torch.nn.Parameter(random(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.scale = torch.nn.Parameter(random(1).reshape(()))
        self.nothing = torch.nn.Parameter(torch.empty(0, 5))
        self.large = torch.nn.Parameter(random(80, 32))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("complex", torch.view_as_complex(random(5, 2)), persistent=False)
        self.register_buffer("diagonal", random(9).diag().diagonal())
        with torch.no_grad():
            self.tiny.view(torch.int16)[0] = 0x7FC1  # a NaN with a payload

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) @ self.q @ self.k @ self.v * self.scale
        return self.head(x) * (self.transposed.sum() + self.conv.sum() + self.large.sum())


def bumped(model: object, name: str, delta: float = 1.0) -> None:
    """Write to a tensor in the way that neither its version nor its address shows."""
    named_tensors(model)[name].data += delta
