"""Memory ahead of demand: exact, zero, never somebody else's, counted, given back, and gone with its threads."""

import errno
import gc
import mmap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelcache import ModelCache, Tier, WeightsError
from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.device.host_only import HostOnlyDevice
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.memory import blocks as blocks_module
from modelcache.dataplane.memory import spare_pages
from modelcache.dataplane.memory.background import Background
from modelcache.dataplane.memory.blocks import RamBlocks
from modelcache.dataplane.memory.spare_pages import Pages, SparePages

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PATIENCE_S = 10.0


def spawn(name, run):
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def until(is_so):
    """Wait for threads of the background, which tell nobody."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if is_so():
            return
        pause.wait(0.005)
    pytest.fail("it never came to that")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.fixture
def device():
    device = SimulatedDevice(1 << 20, faults=Faults())
    yield device
    device.close()


@pytest.fixture
def pool():
    made = []

    def make(device=None, page_locked_bytes=0, *, spare_bytes=MIB, piece_bytes=MIB, spawn=spawn):
        device = device or HostOnlyDevice()
        made.append(RamBlocks(device, page_locked_bytes, spare_bytes=spare_bytes, piece_bytes=piece_bytes, spawn=spawn))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ready(pool):
    pool.prepare()
    until(lambda: pool.is_settled)
    return pool


# --- failures first ---


def test_where_no_thread_can_be_started_pieces_are_made_when_asked_for(pool, device, caplog):
    def refuse(_name, _run):
        raise RuntimeError("can't start new thread")

    blocks = pool(device, page_locked_bytes=MIB, spawn=refuse)
    blocks.prepare()
    piece = blocks.allocate(PAGE)
    assert piece.locked
    assert not piece.memory.any()
    blocks.release(piece)
    assert blocks.live_bytes == blocks.spare_bytes == device.page_locked_bytes == 0
    assert [record.message for record in caplog.records] == [
        "no thread for modelcache-ram: can't start new thread; its work is done when it is asked for"
    ]


def test_memory_that_cannot_be_kept_ready_is_a_warning_and_no_more(pool, monkeypatch, caplog):
    blocks = pool()
    with monkeypatch.context() as patch:
        patch.setattr(spare_pages.mmap, "mmap", fail_to_map)
        blocks.prepare()
        until(lambda: caplog.records)
    assert "to keep ready: " in caplog.records[0].message
    assert blocks.spare_bytes == 0
    assert not blocks.allocate(MIB).memory.any()
    assert ready(blocks).spare_bytes == MIB, "and it is tried again"


def fail_to_map(*_, **__):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_spare_memory_goes_before_a_load_fails_for_memory(pool, monkeypatch):
    blocks = ready(pool())
    of_size, calls = Pages.of_size, []

    def once(size_bytes):
        calls.append(size_bytes)
        if blocks.spare_bytes:
            fail_to_map()
        return of_size(size_bytes)

    monkeypatch.setattr(Pages, "of_size", once)
    piece = blocks.allocate(4 * MIB)
    assert piece.size_bytes == 4 * MIB
    assert calls == [4 * MIB, 4 * MIB]
    assert blocks.spare_bytes == 0


def test_without_spare_memory_a_system_that_has_none_is_an_error(pool, monkeypatch):
    blocks = pool(spare_bytes=0)
    monkeypatch.setattr(spare_pages.mmap, "mmap", fail_to_map)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        blocks.allocate(PAGE)
    assert blocks.live_bytes == 0


def test_a_tensor_over_a_piece_that_was_given_up_keeps_its_bytes_whatever_comes_next(pool):
    blocks = ready(pool(spare_bytes=2 * MIB))
    piece = blocks.allocate(MIB)
    held = [piece.storage(0, 512), piece.memory.view(torch.float32)[1000:1010], piece.memory.numpy(), piece.buffer()]
    piece.memory.fill_(5)
    blocks.release(piece)
    while held:
        others = [blocks.allocate(MIB) for _ in range(3)]
        for other in others:
            assert not other.memory.any()
            other.memory.fill_(9)
        one = held.pop()
        values = (
            bytes(one) if isinstance(one, memoryview) else bytes(torch.as_tensor(one).contiguous().view(torch.uint8))
        )
        assert set(values) == {5}
        assert blocks.live_bytes == 4 * MIB, "it is counted for as long as somebody reads it"
        for other in others:
            blocks.release(other)
        del one, other, others
    until(lambda: blocks.live_bytes == 0)
    until(lambda: blocks.is_settled)
    assert blocks.spare_bytes == 2 * MIB


def test_a_piece_given_up_in_a_cycle_of_garbage_is_not_used_before_it_is_collected(pool):
    blocks = ready(pool())
    piece = blocks.allocate(MIB)
    cycle = {"view": piece.storage(0, MIB)}
    cycle["itself"] = cycle
    address = piece.memory.data_ptr()
    gc.disable()
    try:
        blocks.release(piece)
        del piece, cycle
        other = blocks.allocate(MIB)
        assert other.memory.data_ptr() != address
    finally:
        gc.enable()
    gc.collect()
    until(lambda: blocks.is_settled)


def test_closing_while_memory_is_being_made_ends_the_threads(pool, monkeypatch):
    at_it, go_on = threading.Event(), threading.Event()
    ask = spare_pages.ask_for_pages

    def slow(memory):
        at_it.set()
        go_on.wait(PATIENCE_S)
        ask(memory)

    monkeypatch.setattr(spare_pages, "ask_for_pages", slow)
    blocks = pool(spare_bytes=64 * MIB, piece_bytes=64 * MIB)
    blocks.prepare()
    assert at_it.wait(PATIENCE_S)
    closing = threading.Thread(target=blocks.close)
    closing.start()
    until(lambda: blocks._background.is_closed)
    go_on.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "modelcache-ram"]
    assert blocks.spare_bytes == 0


def test_a_piece_given_up_while_its_pages_are_made_is_given_back_once_nobody_is_at_it(pool, device, monkeypatch):
    at_it, go_on = threading.Event(), threading.Event()

    def slow(_memory):
        at_it.set()
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(spare_pages, "ask_for_pages", slow)
    blocks = pool(device, page_locked_bytes=64 * MIB, spare_bytes=0)
    piece = blocks.allocate(16 * MIB)
    assert at_it.wait(PATIENCE_S)
    giving = threading.Thread(target=blocks.release, args=(piece,))
    giving.start()
    until(lambda: piece.left is not None)
    assert blocks.live_bytes == 16 * MIB
    go_on.set()
    giving.join(PATIENCE_S)
    until(lambda: blocks.live_bytes == 0)
    assert device.page_locked_bytes == blocks.page_locked_bytes == 0


def test_a_job_that_fails_does_not_end_the_thread(caplog):
    background, done = Background(spawn, "modelcache-test", 1), threading.Event()
    assert background.start()
    background.submit(lambda: 1 // 0)
    background.submit(done.set)
    assert done.wait(PATIENCE_S)
    background.close()
    assert "a job of modelcache-test failed" in caplog.text
    assert not background.start(), "closed for good"


# --- what it is for ---


def test_a_spare_piece_is_handed_out_with_its_pages_and_all_zero(pool):
    blocks = ready(pool())
    before = blocks._spare._ready[0].memory().data_ptr()
    piece = blocks.allocate(MIB - 100)
    assert piece.memory.data_ptr() == before
    assert piece.size_bytes == MIB
    assert not piece.memory.any()
    assert blocks.spare_bytes == 0
    assert blocks.live_bytes == MIB


def test_what_is_given_up_serves_again_all_zero(pool):
    blocks = ready(pool())
    piece = blocks.allocate(MIB)
    address = piece.memory.data_ptr()
    piece.memory.fill_(3)
    blocks.release(piece)
    del piece
    until(lambda: blocks.is_settled)
    piece = blocks.allocate(MIB - 512)
    assert piece.memory.data_ptr() == address
    whole = piece.pages.memory()
    assert not whole.any(), "behind the payload too"


def test_a_larger_spare_piece_is_cut_to_the_page(pool):
    blocks = ready(pool(spare_bytes=64 * MIB, piece_bytes=64 * MIB))
    gc.collect()
    before = resident_bytes()
    piece = blocks.allocate(40 * MIB + 1)
    assert piece.size_bytes == 40 * MIB + PAGE == blocks.live_bytes
    assert before - resident_bytes() > 20 * MIB, "the rest went back to the system"
    piece.memory.fill_(1)


def test_a_much_larger_spare_piece_is_not_spent_on_a_small_one(pool):
    blocks = ready(pool())
    piece = blocks.allocate(PAGE)
    assert piece.size_bytes == PAGE
    assert blocks.spare_bytes == MIB


def test_no_more_than_the_spare_is_kept_and_the_rest_goes_back_at_once(pool):
    blocks = ready(pool(spare_bytes=64 * MIB, piece_bytes=32 * MIB))
    gc.collect()
    before = resident_bytes()
    pieces = [blocks.allocate(32 * MIB) for _ in range(4)]
    for piece in pieces:
        piece.memory.fill_(1)
    assert resident_bytes() - before > 60 * MIB
    while pieces:
        blocks.release(pieces.pop())
    del piece
    assert resident_bytes() - before < 4 * MIB
    until(lambda: blocks.is_settled)
    assert blocks.spare_bytes == 64 * MIB
    assert blocks.live_bytes == 0


def test_spare_memory_is_made_again_after_a_load(pool):
    blocks = ready(pool())
    piece = blocks.allocate(MIB)
    assert blocks.spare_bytes == 0
    assert ready(blocks).spare_bytes == MIB
    blocks.release(piece)


def test_a_spare_of_nothing_keeps_nothing(pool):
    blocks = ready(pool(spare_bytes=0))
    blocks.release(blocks.allocate(MIB))
    assert blocks.spare_bytes == blocks.live_bytes == 0


def test_the_pages_of_expected_pieces_are_made_while_nobody_waits(pool):
    blocks = pool(spare_bytes=0)
    blocks.prepare()
    blocks.expect(64 * MIB)
    before = resident_bytes()
    pieces = [blocks.allocate(32 * MIB) for _ in range(3)]
    until(lambda: resident_bytes() - before > 60 * MIB)
    assert resident_bytes() - before < 80 * MIB, "what was not expected has no pages yet"
    assert not any(piece.memory[::PAGE].any() for piece in pieces)


def test_making_pages_leaves_what_was_written_meanwhile(pool):
    blocks = pool(spare_bytes=0)
    blocks.prepare()
    blocks.expect(32 * MIB)
    piece = blocks.allocate(32 * MIB)
    piece.memory[:: 2 * PAGE] = 7
    until(lambda: not blocks._background._jobs.qsize() and not piece.in_background)
    assert piece.memory[:: 2 * PAGE].eq(7).all()
    assert not piece.memory[PAGE :: 2 * PAGE].any()


# --- page-locked ---


def test_pieces_are_page_locked_in_the_background_within_the_budget(pool, device):
    blocks = pool(device, page_locked_bytes=2 * MIB, spare_bytes=0)
    pieces = [blocks.allocate(MIB) for _ in range(3)]
    until(lambda: device.page_locked_bytes == 2 * MIB)
    until(lambda: not blocks._background._jobs.qsize())
    assert sum(piece.locked for piece in pieces) == 2
    for piece in pieces:
        blocks.release(piece)
    until(lambda: device.page_locked_bytes == blocks.page_locked_bytes == 0)


def test_spare_pieces_are_page_locked_ahead_of_demand_within_the_budget(pool, device):
    blocks = ready(pool(device, page_locked_bytes=2 * MIB, spare_bytes=3 * MIB))
    assert blocks.spare_bytes == 3 * MIB
    assert device.page_locked_bytes == blocks.page_locked_bytes == 2 * MIB
    pieces = [blocks.allocate(MIB) for _ in range(3)]
    assert [piece.locked for piece in pieces] == [True, True, False], "the locked ones first"
    for piece in pieces:
        blocks.release(piece)


def test_a_spare_piece_that_must_be_cut_is_page_locked_again(pool, device):
    blocks = ready(pool(device, page_locked_bytes=MIB))
    assert device.page_locked_bytes == MIB
    piece = blocks.allocate(MIB - PAGE)
    assert blocks.spare_bytes == 0
    assert piece.size_bytes == MIB - PAGE
    assert not piece.memory.any()
    until(lambda: piece.locked)
    assert device.page_locked_bytes == blocks.page_locked_bytes == MIB - PAGE


def test_rather_an_unlocked_piece_is_cut(pool):
    spare = SparePages(2 * MIB, MIB)
    locked, other = Pages.of_size(MIB), Pages.of_size(MIB)
    locked.locked = True
    for pages in (locked, other):
        assert spare.expect_new() == MIB
        spare.put(pages)
    assert spare.take(MIB - PAGE) is other
    assert spare.take(MIB - PAGE) is locked


def test_where_page_locking_is_refused_spare_pieces_are_ready_all_the_same(pool, device):
    device.faults.refuse_page_lock()
    blocks = ready(pool(device, page_locked_bytes=MIB))
    assert blocks.spare_bytes == MIB
    assert blocks.page_locked_bytes == device.page_locked_bytes == 0


def test_no_room_is_kept_for_a_piece_that_somebody_still_reads(pool):
    blocks = ready(pool())
    piece = blocks.allocate(MIB)
    view = piece.storage(0, 100)
    blocks.release(piece)
    assert blocks._spare.expect_back(MIB), "the room is free"
    blocks._spare.forgo(MIB)
    assert ready(blocks).spare_bytes == MIB, "another is made instead"
    assert blocks.live_bytes == MIB
    assert not view.any()
    del view, piece
    until(lambda: blocks.live_bytes == 0 and not blocks._background._jobs.qsize())
    until(lambda: blocks.is_settled)
    assert blocks.spare_bytes == MIB, "it goes back to the system"
    assert not blocks._lingering


def test_a_piece_that_somebody_read_for_a_while_serves_again_if_there_is_room(pool):
    blocks = ready(pool())
    piece = blocks.allocate(MIB)
    address, view = piece.memory.data_ptr(), piece.storage(0, 100)
    view.fill_(3)
    blocks.release(piece)
    del view, piece
    until(lambda: blocks.spare_bytes == MIB)
    again = blocks.allocate(MIB)
    assert again.memory.data_ptr() == address
    assert not again.memory.any()


def test_a_locked_piece_comes_back_locked(pool, device):
    blocks = pool(device, page_locked_bytes=8 * MIB, spare_bytes=MIB)
    piece = blocks.allocate(MIB)
    until(lambda: blocks.page_locked_bytes == MIB == device.page_locked_bytes)
    address = piece.memory.data_ptr()
    blocks.release(piece)
    del piece
    until(lambda: blocks.spare_bytes == MIB)
    assert device.page_locked_bytes == MIB
    again = blocks.allocate(MIB)
    assert again.memory.data_ptr() == address
    assert again.locked


def test_a_refusal_to_page_lock_in_the_background_is_one_warning(pool, device, caplog):
    device.faults.refuse_page_lock()
    blocks = pool(device, page_locked_bytes=8 * MIB, spare_bytes=0)
    pieces = [blocks.allocate(MIB) for _ in range(3)]
    until(lambda: not blocks._background._jobs.qsize() and not any(piece.in_background for piece in pieces))
    assert not any(piece.locked for piece in pieces)
    assert blocks.page_locked_bytes == 0
    assert len(caplog.records) == 1
    assert "refused to page-lock 1048576 bytes" in caplog.records[0].message


def test_nothing_is_page_locked_after_closing_though_somebody_still_reads(pool, device):
    blocks = pool(device, page_locked_bytes=8 * MIB, spare_bytes=MIB)
    piece = blocks.allocate(MIB)
    until(lambda: piece.locked)
    view = piece.storage(0, 100)
    blocks.release(piece)
    blocks.close()
    assert device.page_locked_bytes == blocks.page_locked_bytes == 0
    assert not view.any()
    blocks.release(blocks.allocate(PAGE))


def test_threads_end_with_the_pool(pool):
    blocks = ready(pool())
    assert [thread for thread in threading.enumerate() if thread.name == "modelcache-ram"]
    blocks.close()
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "modelcache-ram"]


def test_many_threads_take_and_give_back_at_once(pool):
    blocks = ready(pool(spare_bytes=4 * MIB))
    failures = []

    def work(number):
        for _ in range(20):
            piece = blocks.allocate(MIB - PAGE * (number % 2))
            if piece.memory.any():
                failures.append("not zero")
            piece.memory.fill_(number + 1)
            if not piece.memory.eq(number + 1).all():
                failures.append("somebody else's")
            blocks.release(piece)
            del piece
            blocks.prepare()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(lambda: blocks.is_settled)
    assert blocks.live_bytes == 0
    assert blocks.spare_bytes <= 4 * MIB


# --- the books ---


def test_room_is_kept_for_what_is_coming():
    spare = SparePages(3 * MIB, MIB)
    assert [spare.expect_new() for _ in range(4)] == [MIB, MIB, MIB, 0]
    assert not spare.expect_back(MIB)
    spare.forgo(MIB)
    assert spare.expect_back(MIB)
    assert not spare.is_complete
    for _ in range(3):
        spare.put(Pages.of_size(MIB))
    assert spare.is_complete
    assert spare.ready_bytes == 3 * MIB
    assert len(spare.clear()) == 3
    assert spare.take(MIB) is None


def test_small_pieces_are_not_worth_keeping():
    spare = SparePages(MIB, MIB)
    assert not spare.expect_back(MIB // 8)
    assert spare.expect_back(MIB // 2)
    assert spare.expect_new() == MIB // 2
    assert blocks_module.charge_bytes(1) == PAGE


# --- in a cache ---


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(4))


def test_a_cache_keeps_its_spare_beside_the_models_and_ends_its_threads(tmp_path):
    save_file(Net().state_dict(), tmp_path / "m.safetensors")
    with ModelCache(
        device="host_only", ram="64MiB", ram_spare="4MiB", segment="1MiB", image_dir=tmp_path, progress=False
    ) as cache:
        assert {tier.tier: tier.budget_bytes for tier in cache.status().tiers}[Tier.RAM] == 60 * MIB
        blocks = cache._parts.mover._tiers.blocks
        cache.register("m", model=Net, weights=str(tmp_path / "m.safetensors"))
        for _ in range(4):
            with cache.get("m") as model:
                for name, value in load_file(tmp_path / "m.safetensors").items():
                    assert torch.equal(model.state_dict()[name], value)
                del model
            assert blocks.live_bytes == 4 * MIB
            cache.evict("m")
            until(lambda: blocks.is_settled)
            assert blocks.live_bytes == 0
            assert blocks.spare_bytes == 4 * MIB
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modelcache")]


def test_a_file_that_was_rewritten_between_two_loads_is_refused_also_where_its_bytes_are_not_looked_at_again(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(Net().state_dict(), path)
    with ModelCache(device="host_only", ram="64MiB", image_dir=tmp_path, progress=False) as cache:
        cache.register("m", model=Net, weights=str(path))
        for _ in range(3):
            with cache.get("m"):
                pass
            cache.evict("m")
        save_file(Net().state_dict(), path)
        with pytest.raises(WeightsError, match="the file changed since the model was first read"), cache.get("m"):
            pass
