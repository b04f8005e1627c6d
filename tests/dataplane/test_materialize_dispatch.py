"""accelerate's dispatch with what it forgets written down: the ties, and what went to the folder."""

import copy

import accelerate
import dispatched
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_in_model
from dispatched import (
    ACCELERATOR,
    IDS,
    SPLIT,
    Tiny,
    X,
    assert_stuck,
    assert_whole,
    built_by_accelerate,
    leftovers,
    meta_names,
    portrait,
    skip_if_offloaded_ties_cannot_run,
    state,
)
from safetensors.torch import save_file
from torch import nn

from modelcache import MaterializeError, dispatch_model, materialize_meta_tensors, plan_materialize, restore_dispatch

ON_DISK = {"embed": "disk", "mid": "disk", "head": "disk", "last": "cpu"}


unusable_ties = built_by_accelerate("1.15", "mixes up tied weights that are on meta when it dispatches them")


class Tied(dispatched.Tied):
    """With a part that stays: older versions of accelerate refuse to put all of a model on disk."""

    def __init__(self):
        super().__init__()
        self.last = nn.Identity()


def other_tied():
    """The same model, trained on."""
    model = Tied().eval()
    with torch.no_grad():
        model.mid.bias[2] += 1
    return model


@pytest.mark.parametrize("main_device", [None, ACCELERATOR], ids=["main cpu", "main accelerator"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_it_dispatches_as_accelerate_does_and_can_be_made_whole(tmp_path, main_device, offload_buffers):
    model, theirs = Tiny().eval(), Tiny().eval()
    options = {"main_device": main_device, "offload_buffers": offload_buffers, "skip_keys": ["mask"]}
    output = model(X)
    assert dispatch_model(model, SPLIT, offload_dir=tmp_path / "ours", **options) is model
    accelerate.dispatch_model(theirs, SPLIT, offload_dir=tmp_path / "theirs", **options)
    assert meta_names(model) == meta_names(theirs) != []
    assert leftovers(model) == leftovers(theirs)
    assert model.hf_device_map == theirs.hf_device_map
    assert torch.equal(model(X), theirs(X))
    assert_stuck(model)
    assert model.materialize() is model
    assert_whole(model, state(Tiny()))
    assert torch.allclose(model(X), output, atol=1e-6)
    restore_dispatch(model)
    assert meta_names(model) == meta_names(theirs)
    with model.materialized():
        assert_whole(model, state(Tiny()))
    assert_whole(model.materialize_all(device="cpu"), state(Tiny()))


def test_every_argument_reaches_accelerate(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, **options: seen.update(options))
    options = {
        "main_device": "cpu",
        "state_dict": {},
        "offload_dir": tmp_path,
        "offload_index": {},
        "offload_buffers": True,
        "skip_keys": "mask",
        "preload_module_classes": ["Linear"],
        "force_hooks": True,
        "newer": 1,
    }
    dispatch_model(Tiny(), SPLIT, **options)
    assert seen == {"device_map": SPLIT, **options}


def test_without_allow_materialize_it_is_accelerate_alone(tmp_path):
    accelerate.dispatch_model(other_tied(), ON_DISK, offload_dir=tmp_path)
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path, allow_materialize=False)
    assert not hasattr(model, "materialize")
    materialize_meta_tensors(model)
    assert_whole(model, state(other_tied()))  # as accelerate does: what is in the folder counts


@pytest.mark.parametrize("word", ["auto", "balanced", "sequential"])
def test_a_map_can_be_worked_out(word):
    model = dispatch_model(Tiny().eval(), word)
    assert set(model.hf_device_map) == {""}
    assert_whole(model.materialize(), state(Tiny()))


def test_a_word_that_is_no_map_is_refused():
    with pytest.raises(ValueError, match="must be a mapping or one of 'auto', .*, not 'everywhere'"):
        dispatch_model(Tiny(), "everywhere")


def empty_tied(folder, dispatch):
    """A tied model that was never on a real device, dispatched from plain files and used."""
    checkpoint = str(folder / "m.bin")
    torch.save(Tied().state_dict(), checkpoint)
    with init_empty_weights():
        model = Tied()
    load_checkpoint_in_model(model, checkpoint, ON_DISK, offload_folder=folder / "offload")
    model.head.weight = model.embed.weight  # what `tie_weights()` does
    dispatch(model.eval(), ON_DISK, offload_dir=folder / "offload")
    model(IDS)
    model(IDS)
    return model


@unusable_ties
def test_a_tie_of_which_accelerate_keeps_no_trace_is_one_tensor_again(tmp_path):
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    theirs = materialize_meta_tensors(empty_tied(tmp_path / "theirs", accelerate.dispatch_model))
    assert theirs.embed.weight is not theirs.head.weight
    ours = empty_tied(tmp_path / "ours", dispatch_model)
    assert ("embed.weight", "head.weight") in plan_materialize(ours).ties
    twin = copy.deepcopy(ours)
    for model in (ours, twin):
        model.materialize()
        assert model.embed.weight is model.head.weight
        assert_whole(model, state(Tied()))
    assert ours.embed.weight is not twin.embed.weight


@pytest.mark.parametrize("forwards", [0, 2])
@pytest.mark.parametrize("places", [("cpu", "disk"), ("disk", "cpu"), ("disk", "disk"), ("cpu", "cpu")])
@pytest.mark.parametrize("main_device", ["cpu", ACCELERATOR], ids=["main cpu", "main accelerator"])
def test_a_tie_is_one_tensor_again_wherever_its_halves_went(tmp_path, main_device, places, forwards):
    places = {**ON_DISK, "embed": places[0], "head": places[1]}
    model = dispatch_model(Tied().eval(), places, main_device=main_device, offload_dir=tmp_path)
    if forwards and main_device == "cpu" and places["embed"] != places["head"]:
        skip_if_offloaded_ties_cannot_run()
    for _ in range(forwards):
        model(IDS)
    for _ in range(2):
        model.materialize()
        assert model.embed.weight is model.head.weight
        assert_whole(model, state(Tied()))
        restore_dispatch(model)


def test_two_parameters_over_the_same_memory_are_one_tensor_again(tmp_path):
    model = Tied().eval()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    expected = state(model)
    dispatch_model(model, ON_DISK, offload_dir=tmp_path)
    model.materialize()
    assert_whole(model, expected)
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


@unusable_ties
def test_a_tie_is_found_below_another_model(tmp_path):
    (tmp_path / "a").mkdir()
    above = nn.ModuleDict({"lm": empty_tied(tmp_path / "a", dispatch_model), "other": nn.Linear(2, 2)})
    materialize_meta_tensors(above)
    assert above["lm"].embed.weight is above["lm"].head.weight


def test_a_tie_of_an_earlier_dispatch_does_not_tie_what_was_untied_since(tmp_path):
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path / "first")
    model.materialize(keep_dispatch=False)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    accelerate.disk_offload(model, tmp_path / "second", ACCELERATOR)
    model.materialize()
    assert model.head.weight is not model.embed.weight


def test_a_folder_with_the_weights_of_another_model_is_refused_before_the_weights_are_lost(tmp_path):
    accelerate.dispatch_model(other_tied(), ON_DISK, offload_dir=tmp_path)
    model = Tied().eval()
    before = portrait(model)
    with pytest.raises(MaterializeError, match="already holds other weights.*nothing was dispatched") as caught:
        dispatch_model(model, ON_DISK, offload_dir=tmp_path)
    assert caught.value.names == ("mid.bias",)
    assert str(tmp_path) in str(caught.value)
    assert portrait(model) == before
    dispatch_model(model, ON_DISK, offload_dir=tmp_path / "own").materialize()
    assert_whole(model, state(Tied()))


@pytest.mark.parametrize("damage", ["missing", "short", "shape"])
def test_a_folder_that_lacks_a_weight_is_refused(tmp_path, damage):
    accelerate.dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    index = tmp_path / "index.json"
    match damage:
        case "missing":
            index.write_text(index.read_text().replace("mid.weight", "middle.weight"))
        case "short":
            (tmp_path / "mid.weight.dat").write_bytes(b"short")
        case "shape":
            model = Tied()
            model.mid = nn.Linear(4, 9, bias=False)
            index.write_text(index.read_text().replace('"shape": [\n      6,\n      6\n    ]', '"shape": [4, 9]'))
    with pytest.raises(MaterializeError) as caught:
        dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    assert caught.value.names == ("mid.weight",)


def test_a_folder_with_a_broken_index_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*index.json"):
        dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)


def test_a_folder_with_these_very_weights_is_used_again(tmp_path):
    for _ in range(2):
        model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
        assert_whole(model.materialize(), state(Tied()))


def test_files_that_another_model_wrote_since_are_found_out(tmp_path):
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    twin = copy.deepcopy(model)
    path = tmp_path / "mid.bias.dat"
    stored = path.read_bytes()
    path.write_bytes(stored[:8] + other_tied().mid.bias.detach().numpy().tobytes()[8:])
    for one in (model, twin):
        before = portrait(one)
        with pytest.raises(MaterializeError, match="no longer holds the weights") as caught:
            one.materialize()
        assert caught.value.names == ("mid.bias",)
        assert str(tmp_path) in str(caught.value)
        assert portrait(one) == before
    path.write_bytes(stored)
    for one in (model, twin):
        assert_whole(one.materialize(), state(Tied()))


def test_files_replaced_below_another_model_are_found_out(tmp_path):
    above = nn.ModuleDict({"lm": dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)})
    (tmp_path / "mid.bias.dat").write_bytes(bytes(24))
    with pytest.raises(MaterializeError, match="no longer holds") as caught:
        materialize_meta_tensors(above)
    assert caught.value.names == ("lm.mid.bias",)


def test_a_model_given_another_dtype_since_is_still_the_same_model(tmp_path):
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    model.half()
    model.materialize()
    assert_whole(model, state(Tied().half()))
    restore_dispatch(model)
    (tmp_path / "mid.bias.dat").write_bytes(bytes(24))
    with pytest.raises(MaterializeError, match="no longer holds") as caught:
        model.materialize()
    assert caught.value.names == ("mid.bias",)


def test_weights_written_while_it_was_whole_are_not_held_against_it(tmp_path):
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    with model.materialized(), torch.no_grad():
        model.mid.bias.add_(1)
    model.materialize()
    assert torch.equal(model.mid.bias, Tied().mid.bias + 1)
    assert model.embed.weight is model.head.weight


class Odd(nn.Module):
    """Weights that do not lie in memory as their shape says, and dtypes that numpy does not know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.waves = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("flags", torch.tensor([True, False]))


def test_odd_layouts_and_dtypes_are_recognized(tmp_path):
    model = nn.ModuleDict({"odd": Odd(), "plain": nn.Linear(2, 2)})
    expected = state(model)
    dispatch_model(model, {"odd": "disk", "plain": "cpu"}, main_device=ACCELERATOR, offload_dir=tmp_path)
    assert_whole(model.materialize(), expected)
    assert model["odd"].conv.weight.stride() == Odd().conv.weight.stride()
    restore_dispatch(model)
    for name in ("odd.conv.weight", "odd.scalar", "odd.waves"):
        path = tmp_path / f"{name}.dat"
        stored = path.read_bytes()
        path.write_bytes(bytes(len(stored)))
        with pytest.raises(MaterializeError, match="no longer holds") as caught:
            model.materialize()
        assert caught.value.names == (name,)
        path.write_bytes(stored)


def test_what_an_index_names_is_taken_as_it_is(tmp_path):
    source = Tiny()
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    index = {
        name: {"safetensors_file": str(tmp_path / "m.safetensors"), "weight_name": name, "dtype": "float32"}
        for name, _ in source.named_parameters()
    }
    model = Tiny().eval()
    with torch.no_grad():
        model.linear1.weight.zero_()
    dispatch_model(model, {**SPLIT, "linear1": "disk"}, offload_index=index)
    assert_whole(model.materialize(), state(source))


def test_a_second_dispatch_keeps_what_the_first_one_knew(tmp_path):
    model = dispatch_model(Tied().eval(), ON_DISK, offload_dir=tmp_path)
    dispatch_model(model, ON_DISK, offload_dir=tmp_path)
    (tmp_path / "mid.bias.dat").write_bytes(bytes(24))
    with pytest.raises(MaterializeError, match="no longer holds"):
        model.materialize()


def test_a_part_dispatched_before_keeps_its_own_record(tmp_path):
    """Names in a part's folder begin at the part, and may be the same as others of the whole model."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})})
    expected = state(model)
    dispatch = accelerate.dispatch_model
    for number in range(2):
        dispatch(model["b"], {"a": "disk", "c": "cpu"}, offload_dir=tmp_path / f"part {number}")
        places = {"a": "disk", "b": "cpu"}
        dispatch_model(model, places, main_device=ACCELERATOR, offload_dir=tmp_path / f"whole {number}")
        assert_whole(model.materialize(keep_dispatch=False), expected)
        dispatch = dispatch_model


def test_arguments_that_accelerate_refuses_leave_the_model_as_it_was():
    model = Tied().eval()
    before = portrait(model)
    with pytest.raises(ValueError, match="offload_dir"):
        dispatch_model(model, ON_DISK)
    assert portrait(model) == before
