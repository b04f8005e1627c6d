"""What a new model shares with others is found without a look at all of them, wherever their bytes have gone."""

import contextlib
import random
from contextlib import closing
from functools import partial

import movers
import numpy as np
import pytest
import torch
from movers import Rig

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.inventory import Slot
from modelcache.dataplane.loaded import LoadedModel
from modelcache.dataplane.parts import Part
from modelcache.errors import LoaderError, MoveError
from modelcache.move import Move, Residency
from modelcache.spec import LoaderSpec, ModelSpec

NUM_MODELS = 300


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path, segment_bytes=1024)) as rig:
        yield rig


def tiny():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))


def over(tensor):
    """Another module whose only tensor is this memory."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return module


def spec(name, model):
    return ModelSpec(name, LoaderSpec(call=lambda: model), reload=False)


def found(rig, tensor):
    """The part and the storage that a tensor is found to lie in."""
    share = rig.mover._whereabouts.shared([Slot("it", tensor)]).get(id(tensor))
    return None if share is None else (share.part.id, share.storage)


@pytest.fixture
def looks(monkeypatch):
    """What was looked at: parts and tensors."""
    seen = {"tensors": 0, "parts": 0}

    def counted(owner, name, kind):
        real = getattr(owner, name)

        def call(*args):
            seen[kind] += 1
            return real(*args)

        monkeypatch.setattr(owner, name, call)

    counted(torch.Tensor, "data_ptr", "tensors")
    for name in ("counts", "points_at", "members_of", "is_on_device"):
        counted(Part, name, "parts")
    return seen


def test_a_load_looks_at_no_more_for_hundreds_of_other_models(tmp_path, looks):
    with closing(Rig(tmp_path, segment_bytes=1 << 20, capacity=1 << 30)) as rig:
        costs = []
        for number in range(NUM_MODELS):
            model = tiny()
            looks.update(tensors=0, parts=0)
            (facts,) = rig.mover.load(spec(f"m{number}", model)).parts
            costs.append(dict(looks))
            rig.facts = {facts.part: facts}
            rig.check_books = lambda: None
            rig.stage(facts.part)
            if number % 3:
                rig.promote(facts.part)
        assert costs[-1] == costs[1]
        assert len(rig.mover._whereabouts._with_loader) <= 1
        # The same holds for a model that shares: it looks at what it shares.
        looks.update(tensors=0, parts=0)
        rig.mover.load(spec("late", model))
        late = dict(looks)
        assert sum(late.values()) < 100


def test_what_was_never_staged_is_looked_at_once_for_each_storage(tmp_path, looks):
    with closing(Rig(tmp_path, segment_bytes=1 << 20)) as rig:
        costs = []
        for number in range(20):
            model = tiny()
            looks.update(tensors=0, parts=0)
            rig.mover.load(spec(f"m{number}", model))
            costs.append(looks["tensors"])
        assert costs[10] - costs[9] == len(list(tiny().parameters()))


class BrokenOffError(Exception):
    """Somebody ends a move half way."""


@pytest.fixture(params=["allocated", "mapped"])
def any_rig(request, tmp_path, monkeypatch):
    if request.param == "mapped":
        monkeypatch.setattr(
            movers, "SimulatedDevice", partial(SimulatedDevice, memory="mapped", granularity_bytes=4096)
        )
    with closing(Rig(tmp_path, segment_bytes=1024)) as rig:
        yield rig


def fail_to_settle(*_):
    raise BrokenOffError


@pytest.mark.parametrize("seed", range(6))
def test_every_tensor_is_found_where_it_is_after_any_moves(any_rig, seed, monkeypatch):
    rig, chooser = any_rig, random.Random(seed)
    models = {f"m{i}": tiny() for i in range(6)}
    parts = {name: rig.load(lambda model=model: model, name).parts[0].part for name, model in models.items()}
    for step in range(60):
        name = chooser.choice(sorted(parts))
        part, where = parts[name], rig.mover.residency(parts[name])
        n = rig.n(part)
        assert n > 1
        ways = {(0, 0)} if where.vram < where.ram else {(0, n), (chooser.randint(0, where.vram), 0), (n, where.ram)}
        target = chooser.choice(sorted(ways))
        options = {"write_image": True} if target == (0, n) else {}
        if chooser.random() < 0.3:
            rig.faults.fail(chooser.choice(("copy_in", "copy_out", "allocate")), nth=chooser.randint(1, 3))
        with monkeypatch.context() as patched, contextlib.suppress(MoveError):
            if chooser.random() < 0.2:
                # The last step of a move, after everything points at the new copies.
                patched.setattr(LoadedModel, "settle_in", fail_to_settle)
            rig.move(part, *target, **options)
        if step % 20 == 19:
            rig.mover.forget(name)
            models[name] = tiny()
            parts[name] = rig.load(lambda name=name: models[name], name).parts[0].part
        for each, model in models.items():
            for tensor in model.parameters():
                assert found(rig, tensor)[0] == parts[each]
                assert not tensor.numel() or found(rig, tensor.detach()[4:9]) == found(rig, tensor)
        assert found(rig, torch.zeros(1 << 16)) is None
    for name in models:
        rig.mover.forget(name)
    index = rig.mover._whereabouts
    assert not index._objects
    assert not any(index._starts.values())
    assert not any(index._copies.values())
    assert not index._with_loader


def test_tensors_over_memory_that_a_part_has_left_are_their_own(rig):
    first = tiny()
    (facts,) = rig.load(lambda: first, "first").parts
    rig.stage(facts.part)
    left = first[0].weight.detach()[2:]
    expected = left.clone()
    assert found(rig, left)[0] == facts.part
    rig.spill(facts.part)
    assert found(rig, left) is None
    (own,) = rig.load(lambda: over(left), "second").parts
    assert own.part != facts.part
    rig.stage(facts.part)
    rig.stage(own.part)
    assert torch.equal(rig.mover.object_of("second").weight, expected)
    with torch.no_grad():
        rig.mover.object_of("second").weight.add_(1)
    assert torch.equal(first[0].weight[2:], expected)


def test_tensors_that_were_pointed_elsewhere_before_staging_are_found_there(rig):
    first = tiny()
    (facts,) = rig.load(lambda: first, "first").parts
    before = first[0].weight.detach()
    elsewhere = torch.randn(16, 16)
    first[0].weight.data = elsewhere
    assert found(rig, before) is None
    (joined,) = rig.load(lambda: over(elsewhere[3:5]), "second").parts
    assert joined.part == facts.part
    rig.stage(facts.part)
    rig.mover.object_of("second").weight.data.fill_(7)
    assert first[0].weight[3:5].eq(7).all()


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_a_view_of_what_is_arriving_is_found_on_both_sides(rig, is_broken_off):
    model = tiny()
    (facts,) = rig.load(lambda: model, "m").parts
    rig.stage(facts.part)
    weight = model[0].weight
    in_ram = weight.detach()[1:]
    seen = []

    def progress(name, done, total):
        if weight.device.type != "cpu" and not seen:
            seen.append(weight.detach()[1:])
            # The move may still fail: then it is the RAM copy that counts.
            assert found(rig, seen[0]) == found(rig, in_ram) == found(rig, weight)
            if is_broken_off:
                raise BrokenOffError

    move = Move(facts.part, 1000, rig.mover.residency(facts.part), Residency(rig.n(facts.part), 0), rig.n(facts.part))
    if is_broken_off:
        with pytest.raises(MoveError):
            rig.mover.move(move, progress)
    else:
        rig.mover.move(move, progress)
    counts, other = (in_ram, seen[0]) if is_broken_off else (seen[0], in_ram)
    assert found(rig, counts) == found(rig, weight)
    assert found(rig, other) is None


def test_an_exchanged_tensor_is_found_and_the_old_one_is_not(rig):
    model = tiny()
    (facts,) = rig.load(lambda: model, "m").parts
    rig.stage(facts.part)
    old, new = model[0].weight, torch.nn.Parameter(torch.randn(16, 16))
    place = found(rig, old)
    model[0].weight = new
    assert found(rig, new) is None
    rig.promote(facts.part)
    assert found(rig, new) == place
    rig.park(facts.part)
    assert found(rig, new) == place
    assert found(rig, new.detach()) == place
    rig.spill(facts.part)
    assert found(rig, new) == place
    old.data = torch.zeros(16, 16)
    assert found(rig, old) is None


def test_an_object_that_two_parts_know_stays_known_when_one_lets_go(rig):
    a, b = tiny(), tiny()
    (of_a,), (of_b,) = rig.load(lambda: a, "a").parts, rig.load(lambda: b, "b").parts
    for facts in (of_a, of_b):
        rig.stage(facts.part)
    a[0].weight = b[0].weight
    rig.promote(of_a.part)
    assert found(rig, b[0].weight)[0] in (of_a.part, of_b.part)
    rig.mover.forget("a")
    assert found(rig, b[0].weight)[0] == of_b.part


def test_memory_that_begins_before_what_it_shares_is_refused(rig):
    raw = np.arange(64, dtype=np.uint8)
    (facts,) = rig.load(lambda: over(torch.from_numpy(raw[16:48])), "first").parts
    with pytest.raises(LoaderError, match="reaches beyond the memory it shares with 'first'"):
        rig.load(lambda: over(torch.from_numpy(raw[:32])), "second")
    with pytest.raises(LoaderError, match="reaches beyond the memory it shares with 'first'"):
        rig.load(lambda: over(torch.from_numpy(raw[32:])), "third")
    (beside,) = rig.load(lambda: over(torch.from_numpy(raw[:16])), "fourth").parts
    (inside,) = rig.load(lambda: over(torch.from_numpy(raw[20:30])), "fifth").parts
    assert beside.part != facts.part
    assert inside.part == facts.part


def test_a_load_that_fails_leaves_no_trace(rig, monkeypatch):
    model = tiny()
    monkeypatch.setattr("modelcache.dataplane.loaded.LoadedModel.guard", lambda self, found: 1 / 0)
    with pytest.raises(LoaderError):
        rig.load(lambda: model)
    assert found(rig, model[0].weight) is None
    assert not rig.mover._whereabouts._objects
