"""What users do to a cached model behind our back is taken back in, or named; never lost."""

from contextlib import closing

import pytest
import torch
from movers import Odd, Rig, bits, bumped, same_bits

from modelcache.errors import MoveError


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        yield rig


def resident(rig, make=Odd, **options):
    (part,) = rig.load(make, **options).parts
    rig.stage(part.part)
    rig.promote(part.part)
    return part.part, rig.n(part.part), rig.mover.object_of("m")


def test_a_model_that_was_moved_to_the_cpu_is_taken_back(rig):
    part, n, model = resident(rig)
    bumped(model, "large")
    expected = bits(model)
    model.to("cpu")
    assert rig.park(part).written
    assert same_bits(model, expected)
    rig.promote(part)
    rig.spill(part)
    rig.stage(part)
    assert same_bits(model, expected)
    assert model.head.weight is model.embed.weight


def test_a_parked_model_that_was_moved_to_the_device_is_taken_back(rig):
    part, n, model = resident(rig)
    rig.park(part)
    model.to("sim:0")
    rig.promote(part)
    assert same_bits(model, bits(Odd()))


def test_a_clean_model_that_was_moved_there_and_back_is_clean(rig):
    part, n, model = resident(rig, readable=True)
    model.to("cpu")
    assert not rig.park(part).written
    rig.drop(part)


def test_an_exchanged_parameter_and_buffer_are_adopted(rig):
    part, n, model = resident(rig)
    model.large = torch.nn.Parameter(torch.full_like(model.large, 3.0))
    model.count = torch.tensor(99)
    assert rig.park(part).written
    rig.spill(part)
    rig.stage(part)
    assert torch.equal(model.large, torch.full((80, 32), 3.0))
    assert model.count.item() == 99
    rig.promote(part)
    assert {model.large.device.type, model.count.device.type} == {"sim"}


def test_new_data_of_another_memory_format_keeps_its_values(rig):
    part, n, model = resident(rig)
    values = torch.randn(2, 3, 4, 4)
    model.conv.data = values.to("sim:0").contiguous()
    rig.park(part)
    assert torch.equal(model.conv, values)


CHANGES = {
    "'extra' was added": lambda model: model.register_buffer("extra", torch.ones(3)),
    "'large' was changed from torch.float32 to torch.float16": lambda model: setattr(
        model.large, "data", model.large.data.half()
    ),
    r"'large' was changed from shape \(80, 32\) to \(80, 16\)": lambda model: setattr(
        model.large, "data", model.large.data[:, :16]
    ),
    "'head.weight' was tied to another tensor": lambda model: setattr(
        model.head, "weight", torch.nn.Parameter(model.head.weight.detach().clone())
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_changed_structure_is_named_and_nothing_is_lost(rig, words):
    part, n, model = resident(rig)
    original = {name: tensor.data for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    CHANGES[words](model)
    expected = bits(model)
    before = rig.mover.residency(part)
    for vram, ram, options in ((0, 0, {}), (0, n, {"write_image": True})):
        with pytest.raises(MoveError, match=f"{words}.*unregister it and register it again"):
            rig.mover.move(move_of(rig, part, vram, ram, **options))
        assert rig.mover.residency(part) == before
        assert same_bits(model, expected)
    del original
    rig.mover.forget("m")


def move_of(rig, part, vram, ram, **options):
    from modelcache.move import Move, Residency

    return Move(part, 1, rig.mover.residency(part), Residency(vram, ram), rig.n(part), **options)


@pytest.mark.parametrize("spill", [False, True])
def test_a_tensor_that_was_removed_does_not_hold_the_model_up(rig, spill):
    part, n, model = resident(rig, readable=True)
    expected = bits(model)
    removed = model.large
    del model.large, model.count, model.nothing
    assert not (rig.spill(part) if spill else rig.park(part)).written
    assert rig.device.allocated_bytes() == 0
    if spill:
        rig.stage(part)
    rig.promote(part)
    names = ("large", "count", "nothing")
    assert same_bits(model, {name: value for name, value in expected.items() if name not in names})
    rig.park(part)
    assert torch.equal(removed, Odd().large)


def test_a_tensor_that_was_removed_can_be_put_back(rig):
    part, n, model = resident(rig)
    large, nothing = model.large, model.nothing
    del model.large, model.nothing
    rig.park(part)
    rig.promote(part)
    model.large, model.nothing = large, nothing
    bumped(model, "large")
    expected = bits(model)
    assert rig.park(part).written
    assert same_bits(model, expected)


def test_another_tensor_in_the_place_of_one_that_was_removed_is_named(rig):
    part, n, model = resident(rig)
    del model.large
    rig.park(part)
    model.large = torch.nn.Parameter(torch.ones(80, 32))
    with pytest.raises(MoveError, match="'large' was added"):
        rig.promote(part)
    del model.large
    rig.promote(part)


def test_a_part_of_a_model_may_be_removed_while_another_model_has_it(rig):
    encoder = torch.nn.Linear(16, 16)
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    pipe = torch.nn.Sequential(encoder, torch.nn.BatchNorm1d(16))
    _, own = rig.load(lambda: pipe, "pipe").parts
    for part in (shared.part, own.part):
        rig.stage(part)
        rig.promote(part)
    pipe[0] = torch.nn.Identity()
    expected = bits(pipe), bits(encoder)
    rig.park(own.part)
    rig.park(shared.part)
    assert (same_bits(pipe, expected[0]), same_bits(encoder, expected[1])) == (True, True)
    rig.promote(shared.part)
    assert encoder.weight.device.type == "sim"
    rig.mover.forget("pipe")
    assert same_bits(encoder, expected[1])


def test_a_change_that_is_undone_lets_the_model_go(rig):
    part, n, model = resident(rig)
    model.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(MoveError):
        rig.park(part)
    del model.extra
    rig.park(part)
    assert same_bits(model, bits(Odd()))


def test_a_wrapped_submodule_is_no_change(rig):
    part, n, model = resident(rig)
    model.head = torch.nn.Sequential(model.head)
    rig.park(part)
    assert model.head[0].weight is model.embed.weight
    rig.promote(part)
    model(torch.tensor([[1]], device="sim:0"))


def test_data_given_to_a_model_on_disk_is_named(rig):
    part, n, model = resident(rig)
    rig.spill(part)
    model.large.data = torch.ones(80, 32)
    with pytest.raises(MoveError, match="'large' was given data while the model was on disk"):
        rig.stage(part)


def test_a_model_whose_precision_changed_before_staging_is_named(rig):
    (part,) = rig.load(Odd).parts
    rig.mover.object_of("m").half()
    with pytest.raises(MoveError, match="changed from torch.float32 to torch.float16"):
        rig.stage(part.part)


def test_a_model_of_two_parts_is_taken_back_part_by_part(rig):
    encoder = torch.nn.Linear(16, 16)
    (shared,) = rig.load(lambda: encoder, "encoder").parts
    pipe = torch.nn.Sequential(encoder, torch.nn.BatchNorm1d(16))
    _, own = rig.load(lambda: pipe, "pipe").parts
    for part in (shared.part, own.part):
        rig.stage(part)
        rig.promote(part)
    expected = bits(pipe)
    pipe.to("cpu")
    rig.park(shared.part)
    rig.park(own.part)
    assert same_bits(pipe, expected)
    rig.promote(own.part)
    assert pipe[1].running_mean.device.type == "sim"
