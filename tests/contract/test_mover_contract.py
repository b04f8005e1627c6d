"""What every mover must do, so that the fake one cannot drift from the real one."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from movers import Rig

from modelcache.errors import CacheClosedError, LoaderError, ModelCacheError, MoveError, UnknownModelError
from modelcache.move import KeptWritten, Move, Moved, Residency
from modelcache.spec import LoaderSpec, ModelSpec, OnWrite
from modelcache.testing import FakeModel, FakeMover

_generation = count(1)


class Bound:
    """A mover and one way to talk to it."""

    def spec(self, name, make, *, readable=False, on_write=OnWrite.WRITEBACK):
        return ModelSpec(name, LoaderSpec(call=make), reload=readable, on_write=on_write)

    def load(self, name="m", **options):
        facts = self.mover.load(self.spec(name, self.make, **options))
        (part,) = facts.parts
        return part

    def move(self, part, vram, ram, **options):
        before = self.mover.residency(part.part)
        move = Move(part.part, next(_generation), before, Residency(vram, ram), len(part.ram_bytes), **options)
        return self.mover.move(move)

    def stage(self, part):
        return self.move(part, 0, 0)

    def promote(self, part):
        return self.move(part, len(part.ram_bytes), self.mover.residency(part.part).ram)


class TheTorchMover(Bound):
    def __init__(self, tmp_path):
        self.rig = Rig(tmp_path)
        self.mover = self.rig.mover

    @staticmethod
    def make():
        torch.manual_seed(1)
        return torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(4)))

    @staticmethod
    def weights(model):
        return b"".join(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())

    @staticmethod
    def write(model):
        list(model.parameters())[-1].data += 1

    def close(self):
        self.mover.close()


class TheFakeMover(Bound):
    def __init__(self, tmp_path):
        self.mover = FakeMover(vram_bytes=100_000, ram_bytes=100_000, disk_bytes=100_000)

    @staticmethod
    def make():
        return FakeModel(4096, 4096, 4096, 4096)

    @staticmethod
    def weights(model):
        return model.weights

    @staticmethod
    def write(model):
        model.write(b"written", segment=3)

    def close(self):
        self.mover.close()
        self.mover.oracle.require_nothing()


@pytest.fixture(params=[TheTorchMover, TheFakeMover])
def bound(request, tmp_path):
    bound = request.param(tmp_path)
    yield bound
    bound.close()


def held(bound, part):
    found = bound.mover.held_bytes(part.part)
    return found.vram, found.ram


def test_a_loader_that_raises_or_returns_nonsense_leaves_nothing(bound):
    def raises():
        raise OSError("no such file")

    for make in (raises, lambda: object()):
        with pytest.raises(LoaderError):
            bound.mover.load(bound.spec("m", make))
        with pytest.raises(UnknownModelError):
            bound.mover.object_of("m")
    part = bound.load("m")
    assert held(bound, part) == (0, 0)


def test_an_unknown_part_is_a_move_error(bound):
    with pytest.raises(MoveError, match="does not know this part"):
        bound.mover.move(Move("nobody", 1, Residency(0, 1), Residency(0, 0), 1))


def test_a_move_from_where_the_part_is_not_is_refused_and_changes_nothing(bound):
    part = bound.load()
    bound.stage(part)
    n = len(part.ram_bytes)
    with pytest.raises(ModelCacheError):
        bound.mover.move(Move(part.part, 1, Residency(1, 1), Residency(n, 1), n))
    assert bound.mover.residency(part.part) == Residency(0, 0)


def test_what_nothing_could_bring_back_is_not_dropped(bound):
    part = bound.load()
    bound.stage(part)
    before = bound.weights(bound.mover.object_of("m"))
    assert isinstance(bound.move(part, 0, len(part.ram_bytes)), KeptWritten)
    assert bound.weights(bound.mover.object_of("m")) == before
    assert bound.mover.residency(part.part) == Residency(0, 0)


def test_a_load_holds_nothing_until_it_is_staged(bound):
    part = bound.load()
    n = len(part.ram_bytes)
    assert n == 4
    assert len(part.vram_bytes) == n
    assert bound.mover.residency(part.part) == Residency(0, n)
    assert held(bound, part) == (0, 0)


def test_bytes_are_charged_exactly_where_they_are_all_the_way_up_and_down(bound):
    part = bound.load(readable=True)
    before = bound.weights(bound.mover.object_of("m"))
    vram, ram, n = sum(part.vram_bytes), sum(part.ram_bytes), len(part.ram_bytes)
    assert bound.stage(part).copied_bytes > 0
    assert held(bound, part) == (0, ram)
    moved = bound.promote(part)
    assert isinstance(moved, Moved)
    assert not moved.written
    assert held(bound, part) == (vram, ram)
    assert bound.move(part, n, 2).copied_bytes == 0
    assert held(bound, part) == (vram, sum(part.ram_bytes[2:]))
    assert bound.move(part, 3, 2).copied_bytes == 0
    assert held(bound, part) == (sum(part.vram_bytes[:3]), sum(part.ram_bytes[2:]))
    assert bound.move(part, 1, 1).copied_bytes > 0
    assert held(bound, part) == (part.vram_bytes[0], sum(part.ram_bytes[1:]))
    assert bound.promote(part).freed_bytes == 0
    assert bound.weights(bound.mover.object_of("m")) == before
    assert bound.move(part, 0, n).copied_bytes == 0
    assert held(bound, part) == (0, 0)
    bound.stage(part)
    assert bound.weights(bound.mover.object_of("m")) == before


def test_the_object_is_the_same_one_through_every_move(bound):
    part = bound.load(readable=True)
    model = bound.mover.object_of("m")
    for vram, ram in ((0, 0), (4, 0), (0, 4), (0, 0)):
        bound.move(part, vram, ram)
        assert bound.mover.object_of("m") is model


def test_writes_come_back_with_a_trim(bound):
    part = bound.load()
    bound.stage(part)
    bound.promote(part)
    model = bound.mover.object_of("m")
    bound.write(model)
    after = bound.weights(model)
    moved = bound.move(part, 0, 0)
    assert moved.written
    assert moved.copied_bytes > 0
    assert bound.weights(model) == after


def test_writes_are_kept_where_dropping_would_lose_them(bound):
    part = bound.load(readable=True)
    bound.stage(part)
    bound.promote(part)
    model = bound.mover.object_of("m")
    bound.write(model)
    after = bound.weights(model)
    assert isinstance(bound.move(part, 0, len(part.ram_bytes)), KeptWritten)
    assert bound.mover.residency(part.part) == Residency(4, 0)
    assert bound.weights(model) == after


def test_refused_writes_keep_the_copy_where_it_is(bound):
    part = bound.load(on_write=OnWrite.REFUSE)
    bound.stage(part)
    bound.promote(part)
    bound.write(bound.mover.object_of("m"))
    assert isinstance(bound.move(part, 0, 0), KeptWritten)
    assert bound.mover.residency(part.part) == Residency(4, 0)


def test_discarded_writes_are_gone_after_a_trim(bound):
    part = bound.load(on_write=OnWrite.DISCARD)
    model = bound.mover.object_of("m")
    before = bound.weights(model)
    bound.stage(part)
    bound.promote(part)
    bound.write(model)
    moved = bound.move(part, 0, 0)
    assert not moved.written
    assert bound.weights(model) == before


@pytest.mark.parametrize("is_written", [False, True])
def test_a_spilled_part_comes_back_from_its_image_file(bound, is_written):
    part = bound.load()
    bound.stage(part)
    bound.promote(part)
    model = bound.mover.object_of("m")
    if is_written:
        bound.write(model)
    after = bound.weights(model)
    moved = bound.move(part, 0, len(part.ram_bytes), write_image=True)
    assert moved.written == is_written
    assert bound.mover.held_bytes(part.part).image == part.image_bytes
    assert held(bound, part) == (0, 0)
    bound.stage(part)
    assert bound.weights(model) == after
    bound.mover.drop_image(part.part)
    assert bound.mover.held_bytes(part.part).image == 0
    bound.promote(part)
    assert bound.weights(model) == after


def test_the_last_copy_in_an_image_file_is_not_dropped(bound):
    part = bound.load()
    bound.stage(part)
    bound.move(part, 0, len(part.ram_bytes), write_image=True)
    bound.mover.drop_image(part.part)
    bound.stage(part)


def test_a_move_without_a_look_gives_up_whatever_is_there(bound):
    part = bound.load()
    bound.stage(part)
    bound.promote(part)
    bound.move(part, 0, len(part.ram_bytes), check=False)
    assert held(bound, part) == (0, 0)
    bound.mover.forget("m")


def test_forgetting_frees_everything_and_the_name(bound):
    part = bound.load()
    bound.stage(part)
    bound.promote(part)
    bound.mover.forget("m")
    bound.mover.forget("m")
    assert held(bound, part) == (0, 0)
    with pytest.raises(UnknownModelError):
        bound.mover.object_of("m")
    bound.load("m")


def test_a_loaded_name_is_not_loaded_again(bound):
    bound.load()
    with pytest.raises(ModelCacheError):
        bound.load()


def test_dropping_an_image_file_that_is_not_there_is_fine(bound):
    part = bound.load()
    bound.mover.drop_image(part.part)
    bound.mover.drop_image("nobody")
    bound.mover.release_cached()


def test_progress_ends_with_everything_done(bound):
    told = []
    part = bound.load()
    n = len(part.ram_bytes)
    move = Move(part.part, 1, Residency(0, n), Residency(0, 0), n)
    bound.mover.move(move, lambda name, done, total: told.append((name, done, total)))
    assert told
    assert all(name == "m" and 0 <= done <= total for name, done, total in told)
    assert told[-1][1] == told[-1][2]


def test_a_model_in_use_keeps_its_bytes_when_the_mover_is_closed(bound):
    for name in ("used", "idle"):
        part = bound.load(name)
        bound.stage(part)
        bound.promote(part)
    model = bound.mover.object_of("used")
    expected = bound.weights(model)
    bound.mover.close(in_use=["used"])
    assert bound.weights(model) == expected
    assert held(bound, part) == (0, 0)


def test_a_closed_mover_refuses_and_closing_twice_is_fine(bound):
    part = bound.load()
    bound.stage(part)
    bound.mover.close()
    bound.mover.close()
    assert held(bound, part) == (0, 0)
    with pytest.raises(CacheClosedError):
        bound.load("other")
    with pytest.raises(CacheClosedError):
        bound.mover.move(Move(part.part, 1, Residency(0, 0), Residency(4, 0), 4))
