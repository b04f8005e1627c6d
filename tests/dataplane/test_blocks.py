"""RAM pieces: exact, returned to the system, page-locked within a budget, refusals survived."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.device.host_only import HostOnlyDevice
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.memory.blocks import RamBlocks, charge_bytes, return_freed_heap

PAGE = mmap.PAGESIZE


@pytest.fixture
def device():
    device = SimulatedDevice(1 << 20, faults=Faults())
    yield device
    device.close()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_a_piece_takes_whole_pages_and_holds_its_payload():
    blocks = RamBlocks(HostOnlyDevice())
    piece = blocks.allocate(PAGE + 1)
    assert piece.size_bytes == charge_bytes(PAGE + 1) == 2 * PAGE == blocks.live_bytes
    assert piece.memory.shape == (PAGE + 1,)
    assert not piece.memory.any()
    with piece.buffer() as buffer:
        assert len(buffer) == PAGE + 1
        buffer[PAGE] = 7
    assert piece.memory[PAGE] == 7
    blocks.release(piece)
    assert blocks.live_bytes == 0
    assert charge_bytes(0) == 0


def test_a_storage_of_a_piece_is_a_torch_storage_of_its_own():
    piece = RamBlocks(HostOnlyDevice()).allocate(8192)
    one, other = piece.storage(0, 512), piece.storage(512, 100)
    assert other.untyped_storage().nbytes() == 100
    assert other.data_ptr() == piece.memory.data_ptr() + 512
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert piece.storage(100, 0).numel() == 0


def test_released_memory_goes_back_to_the_system():
    blocks = RamBlocks(HostOnlyDevice())
    gc.collect()
    before = resident_bytes()
    piece = blocks.allocate(64 << 20)
    piece.memory.fill_(1)
    assert resident_bytes() - before > 60 << 20
    blocks.release(piece)
    assert resident_bytes() - before < 4 << 20
    return_freed_heap()


def test_memory_that_somebody_reads_stays_and_is_counted():
    blocks = RamBlocks(HostOnlyDevice())
    piece = blocks.allocate(4096)
    view = piece.storage(0, 512)
    view.fill_(5)
    blocks.release(piece)
    assert blocks.live_bytes == PAGE
    assert view.eq(5).all()
    del view
    assert blocks.live_bytes == 0


def test_page_locking_stays_within_its_budget(device):
    blocks = RamBlocks(device, page_locked_bytes=2 * PAGE)
    pieces = [blocks.allocate(PAGE) for _ in range(3)]
    assert [piece.locked for piece in pieces] == [True, True, False]
    assert blocks.page_locked_bytes == 2 * PAGE
    blocks.release(pieces.pop(0))
    assert device.page_locked_bytes == PAGE
    pieces.append(blocks.allocate(PAGE))
    assert pieces[-1].locked
    for piece in pieces:
        blocks.release(piece)
    assert blocks.page_locked_bytes == device.page_locked_bytes == 0


def test_a_refusal_is_one_warning_and_ordinary_memory(device, caplog):
    blocks = RamBlocks(device, page_locked_bytes=1 << 20)
    device.faults.refuse_page_lock()
    pieces = [blocks.allocate(PAGE) for _ in range(3)]
    assert not any(piece.locked for piece in pieces)
    assert blocks.page_locked_bytes == 0
    assert [record.message for record in caplog.records] == [
        (
            f"{device.name} refused to page-lock 4096 bytes of RAM; copies go on from ordinary memory, more slowly: raise "
            "the limit of locked memory (ulimit -l) or set budgets.page_locked to 0"
        )
    ]


def test_a_host_only_machine_never_page_locks():
    blocks = RamBlocks(HostOnlyDevice(), page_locked_bytes=1 << 20)
    assert not blocks.allocate(PAGE).locked


def test_memory_that_is_not_there_is_an_error_and_costs_nothing():
    blocks = RamBlocks(HostOnlyDevice())
    with pytest.raises((OSError, OverflowError, MemoryError)):
        blocks.allocate(1 << 62)
    assert blocks.live_bytes == 0


def test_a_piece_outlives_its_tensor_arithmetic():
    piece = RamBlocks(HostOnlyDevice()).allocate(4096)
    values = piece.storage(0, 4096).view(torch.float32)
    values += 1
    assert piece.memory.view(torch.float32).eq(1).all()
