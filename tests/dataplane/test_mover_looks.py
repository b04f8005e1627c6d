"""Looking at a part on the device while others may use it: what counts as written, and that nothing is changed by it."""

import threading
from contextlib import closing

import pytest
import torch
from accelerate import dispatch_model
from dispatched import Tied, Tiny
from movers import Odd, Rig

from modelcache.move import Moved


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        yield rig


@pytest.fixture
def up(rig):
    """A model on the device: its object and its part."""
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    rig.promote(part.part)
    return rig.mover.object_of("m"), part.part


def test_what_came_up_is_unwritten(rig, up):
    _, part = up
    assert rig.mover.is_unwritten(part)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.large.data.add_(1),
        lambda model: model.large[3].zero_(),
        lambda model: model.count.add_(1),
        lambda model: model.large.copy_(model.large[torch.arange(79, -1, -1)]),
    ],
    ids=["data", "a row", "a buffer", "rows exchanged"],
)
def test_a_write_of_any_kind_is_seen(rig, up, write):
    model, part = up
    with torch.no_grad():
        write(model)
    assert not rig.mover.is_unwritten(part)


def test_a_tensor_of_the_users_own_is_a_change_and_stays_where_it_is(rig, up):
    model, part = up
    model.large = torch.nn.Parameter(model.large.detach().clone())
    mine = model.large
    assert not rig.mover.is_unwritten(part)
    assert model.large is mine
    assert isinstance(rig.park(part), Moved)  # the move that gives it up takes the user's tensor in


def test_an_added_tensor_is_a_change(rig, up):
    model, part = up
    model.register_buffer("more", torch.ones(3, device="sim:0"))
    assert not rig.mover.is_unwritten(part)
    del model.more


def test_part_of_it_on_the_device_is_looked_at(rig, up):
    model, part = up
    rig.move(part, 1, 1)
    assert rig.mover.is_unwritten(part)
    with torch.no_grad():
        model.q.add_(1)
    assert not rig.mover.is_unwritten(part)


def test_nobody_can_say_of_an_unknown_part(rig):
    assert not rig.mover.is_unwritten("gone#1")


def test_a_model_that_runs_from_its_dispatch_is_looked_at_as_it_runs(rig, tmp_path):
    def load():
        return dispatch_model(Tied().eval(), {"embed": "sim:0", "mid": "disk", "head": "disk"}, offload_dir=tmp_path)

    facts = rig.load(load)
    on, off = sorted(facts.parts, key=lambda part: part.offloaded)
    rig.stage(on.part)
    rig.stage(off.part)
    rig.promote(on.part)
    model = rig.mover.object_of("m")
    assert model.mid.weight.is_meta
    assert rig.mover.is_unwritten(on.part)
    assert model.mid.weight.is_meta
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert not rig.mover.is_unwritten(on.part)


def test_looks_and_moves_get_along(rig):
    parts = {}
    for name in ("a", "b"):
        (facts,) = rig.load(Tiny, name).parts
        parts[name] = facts.part
        rig.stage(facts.part)
    over = threading.Event()

    def look():
        while not over.is_set():
            for part in parts.values():
                rig.mover.is_unwritten(part)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(100):
            for part in parts.values():
                rig.promote_quietly(part)
                rig.park_quietly(part)
    finally:
        over.set()
        looker.join()
    for name in parts:
        assert all(torch.equal(t, Tiny().state_dict()[n]) for n, t in rig.mover.object_of(name).state_dict().items())
