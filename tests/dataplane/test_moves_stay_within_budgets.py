"""What a move needs on the way is within the budgets too, and what failed keeps no memory."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from movers import Odd, Rig, bits, same_bits

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.memory.blocks import RamBlocks
from modelcache.errors import MoveError


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_what_only_the_device_holds_is_spilled_without_more_ram(rig):
    (facts,) = rig.load(Odd).parts
    model, part = rig.mover.object_of("m"), facts.part
    expected = bits(model)
    rig.stage(part)
    rig.promote(part)
    rig.move(part, rig.n(part), rig.n(part))
    assert rig.mover.live_ram_bytes == 0
    seen = []

    def write(descriptor: int, data: memoryview) -> int:
        seen.append(rig.mover.live_ram_bytes)
        return os.write(descriptor, data)

    rig.mover._tiers.files._write = write
    moved = rig.spill(part)
    assert moved.copied_bytes
    assert len(seen) > rig.n(part)
    assert set(seen) == {0}
    rig.stage(part)
    assert same_bits(model, expected)


def test_a_spill_that_fails_keeps_no_memory_even_for_whoever_keeps_the_error(rig):
    (facts,) = rig.load(Odd).parts
    part = facts.part
    rig.stage(part)
    rig.promote(part)
    rig.move(part, rig.n(part), rig.n(part))
    rig.faults.fail("copy_out")
    gc.disable()
    try:
        with pytest.raises(MoveError, match="injected transient error") as kept:
            rig.spill(part)
        assert any("giving_up.py" in note for note in kept.value.__notes__)
        rig.mover.forget("m")
        assert rig.device.allocated_bytes() == 0
    finally:
        gc.enable()


class SlowToLock(SimulatedDevice):
    """Page-locks as slowly as a test wants."""

    def __init__(self) -> None:
        super().__init__(1 << 20, link_bytes_per_s=None)
        self.locks, self.go = threading.Event(), threading.Event()

    def page_lock(self, memory: torch.Tensor) -> bool:
        self.locks.set()
        self.go.wait()
        return super().page_lock(memory)


def test_ram_that_the_background_is_at_is_free_only_once_it_is_left():
    device = SlowToLock()

    def spawn(name: str, run):
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    blocks = RamBlocks(device, 1 << 20, piece_bytes=4096, spawn=spawn)
    piece = blocks.allocate(4096)
    assert device.locks.wait(10)
    gives_up = threading.Thread(target=blocks.release, args=(piece,))
    gives_up.start()
    while not piece.is_released:
        gives_up.join(0.001)
    assert gives_up.is_alive()
    assert blocks.live_bytes == 4096
    device.go.set()
    gives_up.join(10)
    assert blocks.live_bytes == 0
    assert blocks.page_locked_bytes == 0
    blocks.close()
    device.close()
