"""Two models that share memory share it on every tier; the last one to leave takes it away."""

from contextlib import closing

import pytest
import torch
from movers import Rig, bits, bumped, same_bits

from modelcache.errors import LoaderError, ModelNotResidentError
from modelcache.move import KeptWritten
from modelcache.spec import OnWrite


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path, segment_bytes=2048)) as rig:
        yield rig


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return self.b(self.a(x))


class Pipeline:
    """An object with modules as attributes, as pipelines are."""

    def __init__(self, encoder):
        self.encoder, self.head = encoder, torch.nn.Linear(16, 40)

    def __call__(self, x):
        return self.head(self.encoder(x))


def up(rig, *parts):
    for part in parts:
        rig.stage(part)
        rig.promote(part)


def test_a_shared_module_is_one_part_of_both(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    first, own = rig.load(lambda: Pipeline(encoder), "pipe").parts
    assert first == shared
    assert own.part.startswith("pipe#")
    assert sum(own.ram_bytes) < sum(shared.ram_bytes) * 2
    up(rig, shared.part, own.part)
    x = torch.ones(1, 16, device="sim:0")
    with torch.no_grad():
        rig.mover.object_of("pipe")(x)
        encoder(x)


def test_a_model_runs_while_the_other_half_of_its_partner_is_away(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    _, own = rig.load(lambda: Pipeline(encoder), "pipe").parts
    up(rig, shared.part)
    x = torch.ones(1, 16, device="sim:0")
    with torch.no_grad():
        encoder(x)
        with pytest.raises(ModelNotResidentError, match="'pipe'"):
            rig.mover.object_of("pipe")(x)
    x = x.cpu()
    rig.park(shared.part)
    with pytest.raises(ModelNotResidentError):
        encoder(x)


def test_a_write_through_one_is_seen_by_the_other_on_every_tier(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    rig.load(lambda: Pipeline(encoder), "pipe")
    up(rig, shared.part)
    bumped(rig.mover.object_of("pipe"), "encoder.a.weight")
    expected = bits(encoder)
    assert rig.park(shared.part).written
    assert same_bits(encoder, expected)
    assert same_bits(rig.mover.object_of("pipe").encoder, expected)


def test_a_shared_part_stays_until_its_last_model_leaves(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    _, own = rig.load(lambda: Pipeline(encoder), "pipe").parts
    up(rig, shared.part, own.part)
    expected = bits(encoder)
    rig.mover.forget("encoder")
    assert rig.mover.held_bytes(shared.part).vram == sum(shared.vram_bytes)
    assert same_bits(encoder, expected)
    rig.park(shared.part)
    rig.mover.forget("pipe")
    assert rig.mover.live_ram_bytes == 0


WHERE = ["with the loader", "in ram", "in vram"]


@pytest.mark.parametrize("where", WHERE)
def test_other_tensors_over_the_same_memory_join_the_part(rig, where):
    first = Encoder()
    (shared,) = rig.load(lambda: first, "first").parts
    moves = [rig.stage, rig.promote, rig.park, rig.spill, rig.stage, rig.promote]
    for _ in range(WHERE.index(where)):
        moves.pop(0)(shared.part)

    def make():
        model = torch.nn.Linear(16, 8, bias=False, device=first.a.weight.device)
        model.weight = torch.nn.Parameter(first.a.weight.detach()[8:16])
        return model

    (joined,) = rig.load(make, "second").parts
    second = rig.mover.object_of("second")
    assert joined == shared
    for move in moves:
        move(shared.part)
        if first.a.weight.numel():
            assert torch.equal(first.a.weight[8:16].cpu(), second.weight.cpu())
    with torch.no_grad():
        second.weight.data += 1
    assert torch.equal(first.a.weight[8:16].cpu(), second.weight.cpu())
    rig.mover.forget("first")
    assert torch.equal(second.weight.cpu(), Encoder().a.weight[8:16] + 1)


def test_a_model_that_joins_while_the_part_is_on_disk_comes_back_with_it(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    rig.stage(shared.part)
    rig.spill(shared.part)
    first, own = rig.load(lambda: Pipeline(encoder), "pipe").parts
    assert first == shared
    up(rig, shared.part, own.part)
    assert same_bits(rig.mover.object_of("pipe").encoder, bits(Encoder()))


def test_the_same_object_under_two_names_is_one_part(rig):
    encoder = Encoder()
    first, second = rig.load(lambda: encoder, "a"), rig.load(lambda: encoder, "b")
    assert first.parts == second.parts
    up(rig, first.parts[0].part)
    rig.mover.forget("a")
    with torch.no_grad():
        encoder(torch.ones(1, 16, device="sim:0"))


@pytest.mark.parametrize("where", ["with the loader", "in vram", "on disk"])
@pytest.mark.parametrize("whole", [True, False], ids=["the same model", "a part of it"])
def test_what_another_cache_moves_is_refused_and_stays_as_it_is(rig, tmp_path, where, whole):
    model = Pipeline(Encoder())
    (part,) = rig.load(lambda: model, "mine").parts
    if where != "with the loader":
        up(rig, part.part)
    if where == "on disk":
        rig.spill(part.part)
    with closing(Rig(tmp_path / "other")) as other:
        with pytest.raises(LoaderError, match="tensors of 'mine' of another cache"):
            other.load(lambda: model if whole else model.encoder, "yours")
        other.load(lambda: Pipeline(Encoder()), "yours")
    if where != "with the loader":
        up(rig, part.part)
        with torch.no_grad():
            model(torch.ones(1, 16, device="sim:0"))


def test_a_model_that_another_cache_let_go_of_with_its_weights_is_welcome(rig, tmp_path):
    encoder = Encoder()
    with closing(Rig(tmp_path / "other")) as other:
        other.load(lambda: encoder, "yours")
        other.mover.forget("yours")
        (part,) = rig.load(lambda: encoder, "mine").parts
        up(rig, part.part)
    assert same_bits(encoder, bits(Encoder()))


def test_a_model_whose_weights_are_gone_is_not_taken_for_one_of_empty_tensors(rig):
    pipeline = Pipeline(Encoder())
    (part,) = rig.load(lambda: pipeline.encoder, "old").parts
    up(rig, part.part)
    rig.mover.forget("old")
    for model in (pipeline.encoder, pipeline):
        with pytest.raises(LoaderError, match="was the model 'old' until it was unregistered; build a new one"):
            rig.load(lambda model=model: model, "new")


def test_the_strictest_of_the_holders_decides_about_writes(rig):
    encoder = Encoder()
    (shared,) = rig.load(lambda: encoder, "a", on_write=OnWrite.DISCARD).parts
    rig.load(lambda: encoder, "b", on_write=OnWrite.REFUSE)
    up(rig, shared.part)
    bumped(encoder, "a.weight")
    assert isinstance(rig.park(shared.part), KeptWritten)
    rig.mover.forget("b")
    assert not rig.park(shared.part).written


def test_memory_shared_inside_an_element_is_refused(rig):
    raw = torch.zeros(64, dtype=torch.uint8)

    def make():
        module = torch.nn.Module()
        module.register_buffer("a", torch.from_numpy(raw.numpy()[1:33]))
        module.register_buffer("b", torch.frombuffer(raw.numpy(), dtype=torch.float32, count=4, offset=4))
        return module

    with pytest.raises(LoaderError, match="inside one of its elements"):
        rig.load(make)


def test_memory_shared_through_other_libraries_is_one_storage(rig):
    raw = torch.arange(64, dtype=torch.uint8)

    def make():
        module = torch.nn.Module()
        module.register_buffer("a", torch.from_numpy(raw.numpy()[:32]))
        module.register_buffer("b", torch.from_numpy(raw.numpy()[16:48]))
        return module

    (part,) = rig.load(make).parts
    model = rig.mover.object_of("m")
    rig.stage(part.part)
    rig.promote(part.part)
    model.a.data[16:] = 99
    rig.park(part.part)
    assert model.b[:16].tolist() == [99] * 16
    assert model.b[16:].tolist() == list(range(32, 48))
