"""The dispatch comes back as it was, with what was written meanwhile."""

import copy
import gc
import io
import weakref
from dataclasses import dataclass

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from dispatched import (
    ACCELERATOR,
    IDS,
    REFUSES,
    SPLIT,
    Nested,
    Tied,
    Tiny,
    X,
    assert_moves,
    assert_whole,
    check_round,
    meta_names,
    portrait,
    runs_offloaded_ties,
    state,
)
from torch import nn

from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    plan_materialize,
    restore_dispatch,
)
from modelcache.errors import MaterializeError


@pytest.fixture
def model(tmp_path):
    return dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path)


DISPATCHES = {
    "main cpu": lambda m, d: dispatch_model(m, SPLIT, offload_dir=d),
    "main accelerator": lambda m, d: dispatch_model(m, SPLIT, main_device=ACCELERATOR, offload_dir=d),
    "buffers": lambda m, d: dispatch_model(m, SPLIT, main_device=ACCELERATOR, offload_dir=d, offload_buffers=True),
    "cpu_offload": lambda m, d: cpu_offload(m, ACCELERATOR),
    "disk_offload": lambda m, d: disk_offload(m, d, ACCELERATOR),
    "twice": lambda m, d: dispatch_model(dispatch_model(m, SPLIT, offload_dir=d), SPLIT, offload_dir=d),
}


@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES)
def test_every_object_of_the_dispatch_is_back_in_its_place(tmp_path, dispatch):
    model = Tiny().eval()
    expected, output = state(model), model(X)
    dispatch(model, tmp_path)
    before, metas = portrait(model), meta_names(model)
    for _ in range(2):
        materialize_meta_tensors(model)
        model(X)
        assert restore_dispatch(model) is model
        assert portrait(model) == before
        assert meta_names(model) == metas
        with pytest.raises((RuntimeError, NotImplementedError)):
            model.to("cpu")
    assert torch.allclose(model(X), output, atol=1e-6)
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_restored_model_refuses_to_move_again_and_knows_its_map(model):
    places = dict(model.hf_device_map)
    materialize_meta_tensors(model)
    assert not hasattr(model, "hf_device_map")
    restore_dispatch(model)
    assert model.hf_device_map == places
    with pytest.raises(RuntimeError, match=REFUSES):
        model.to("cpu")


@runs_offloaded_ties
def test_a_tied_model_is_restored_and_made_whole_again(tmp_path):
    model = Tied().eval()
    output = model(IDS)
    dispatch_model(model, {"embed": "cpu", "mid": "disk", "head": "disk"}, offload_dir=tmp_path)
    model(IDS)
    for _ in range(2):
        materialize_meta_tensors(model)
        assert model.embed.weight is model.head.weight
        restore_dispatch(model)
        assert torch.allclose(model(IDS), output, atol=1e-6)


# --- what was written meanwhile ---


@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES)
@pytest.mark.parametrize("how", ["in place", "behind its back", "other memory", "load_state_dict", "other object"])
def test_a_change_survives_the_restore(tmp_path, dispatch, how):
    model = Tiny().eval()
    dispatch(model, tmp_path)
    materialize_meta_tensors(model)
    weight = model.linear2.weight
    with torch.no_grad():
        match how:
            case "in place":
                weight.add_(1)
            case "behind its back":
                weight.data.add_(1)
            case "other memory":
                weight.data = weight.data + 1
            case "load_state_dict":
                model.load_state_dict({**model.state_dict(), "linear2.weight": weight + 1})
            case _:
                model.linear2.weight = nn.Parameter(weight + 1)
    expected, output = state(model), model(X)
    restore_dispatch(model)
    assert model.linear2.weight.is_meta
    assert torch.allclose(model(X), output, atol=1e-6)
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_change_of_dtype_survives_the_restore(model):
    materialize_meta_tensors(model)
    model.double()
    expected, output = state(model), model(X.double())
    restore_dispatch(model)
    assert model.linear2.weight.is_meta
    assert torch.allclose(model(X.double()), output)
    assert_whole(materialize_meta_tensors(model), expected)


@pytest.mark.parametrize("how", ["in place", "behind its back", "dtype"])
def test_a_change_is_found_when_it_is_an_error(model, how):
    materialize_meta_tensors(model)
    with torch.no_grad():
        match how:
            case "in place":
                model.linear2.weight.add_(1)
            case "behind its back":
                model.linear2.weight.data.add_(1)
            case _:
                model.linear2.weight.data = model.linear2.weight.data.double()
    before = portrait(model)
    with pytest.raises(MaterializeError, match="written to") as caught:
        restore_dispatch(model, on_modified="error")
    assert caught.value.names == ("linear2.weight",)
    assert portrait(model) == before
    restore_dispatch(model)


def test_an_in_place_change_of_shared_memory_is_found_when_it_is_an_error():
    model = Tiny().eval()
    cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model)
    with torch.no_grad():
        model.linear1.bias.add_(1)
    with pytest.raises(MaterializeError) as caught:
        restore_dispatch(model, on_modified="error")
    assert caught.value.names == ("linear1.bias",)


def test_no_change_is_no_error(model):
    materialize_meta_tensors(model)
    model(X)
    restore_dispatch(model, on_modified="error")


def test_a_change_can_be_discarded(model):
    expected = state(Tiny())
    materialize_meta_tensors(model)
    with torch.no_grad():
        model.linear2.weight.add_(1)
    restore_dispatch(model, on_modified="discard")
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_change_with_no_place_to_go_is_refused_and_can_be_discarded(tmp_path):
    disk_offload(Nested(), tmp_path, ACCELERATOR)  # fills the folder
    model = Nested()
    cpu_offload(model.out, ACCELERATOR)
    model.blk.to("meta")
    materialize_meta_tensors(model, extra_sources=tmp_path)
    with torch.no_grad():
        model.blk.scale.add_(1)
    before = portrait(model)
    with pytest.raises(MaterializeError, match="no place to keep the change") as caught:
        restore_dispatch(model)
    assert caught.value.names == ("blk.scale",)
    assert portrait(model) == before
    restore_dispatch(model, on_modified="discard")
    assert model.blk.scale.is_meta


# --- what stands in the way ---


def test_there_is_nothing_to_restore_on_a_model_that_was_not_dispatched():
    model = Tiny()
    for one in (model, materialize_meta_tensors(Tiny())):
        with pytest.raises(MaterializeError, match="no dispatch to restore"):
            restore_dispatch(one)


def test_a_dispatch_that_was_not_kept_cannot_be_restored(model):
    materialize_meta_tensors(model, keep_dispatch=False)
    assert not [key for key in vars(model) if "modelcache" in key]
    with pytest.raises(MaterializeError, match="keep_dispatch=False"):
        restore_dispatch(model)


def test_a_kept_dispatch_can_be_dropped_later(model):
    materialize_meta_tensors(model)
    materialize_meta_tensors(model, keep_dispatch=False)
    with pytest.raises(MaterializeError):
        restore_dispatch(model)


def test_a_dispatch_that_is_not_kept_is_freed(tmp_path):
    for keep in (True, False):
        model = Tiny()
        cpu_offload(model, ACCELERATOR)
        hook = weakref.ref(model.linear1._hf_hook)
        materialize_meta_tensors(model, keep_dispatch=keep)
        gc.collect()
        assert (hook() is not None) == keep


def test_a_model_with_a_kept_dispatch_can_be_collected(tmp_path):
    model = dispatch_model(Tiny(), SPLIT, offload_dir=tmp_path)
    materialize_meta_tensors(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_do_not_take_the_dispatch_along(tmp_path):
    model = Tiny()
    cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert not is_dispatched(twin)
        assert_whole(twin, state(model))
        with pytest.raises(MaterializeError, match="no dispatch to restore"):
            restore_dispatch(twin)
        materialize_meta_tensors(twin)
        assert_moves(twin)
    restore_dispatch(model)


def test_hooks_added_since_are_not_thrown_away(model):
    materialize_meta_tensors(model)
    add_hook_to_module(model.linear2, ModelHook())
    before = portrait(model)
    with pytest.raises(MaterializeError, match="was set after it was materialized"):
        restore_dispatch(model)
    assert portrait(model) == before


def test_a_dispatch_after_the_materializing_is_the_one_that_counts(model, tmp_path):
    materialize_meta_tensors(model)
    cpu_offload(model, ACCELERATOR)
    before = portrait(model)
    materialize_meta_tensors(model)
    restore_dispatch(model)
    after = portrait(model)
    for path, (attributes, *tables) in before.items():
        attributes.pop("_modelcache_dispatch", None)
        assert after[path] == (attributes, *tables)


def test_a_tensor_removed_since_stops_the_restore(model):
    materialize_meta_tensors(model)
    model.linear2.bias = None
    before = portrait(model)
    with pytest.raises(MaterializeError, match="removed") as caught:
        restore_dispatch(model)
    assert caught.value.names == ("linear2.bias",)
    assert portrait(model) == before


def test_modules_added_since_are_kept_with_a_warning(model):
    materialize_meta_tensors(model)
    model.adapter = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="adapter"):
        restore_dispatch(model)
    assert not model.adapter.weight.is_meta


def test_a_word_that_is_no_choice_is_refused(model):
    materialize_meta_tensors(model)
    with pytest.raises(ValueError, match="on_modified"):
        restore_dispatch(model, on_modified="maybe")


# --- for the length of a block ---


def test_a_block_sees_a_whole_model_and_leaves_a_dispatched_one(model):
    with materialized(model) as whole, torch.no_grad():
        assert whole is model
        model.linear2.weight.add_(1)
        output = model(X)
        model.to("cpu")
    assert model.linear2.weight.is_meta
    assert torch.allclose(model(X), output, atol=1e-6)


def test_a_block_that_raises_leaves_a_dispatched_model(model):
    output = model(X)
    with pytest.raises(ZeroDivisionError), materialized(model):
        raise ZeroDivisionError
    assert model.linear2.weight.is_meta
    assert torch.allclose(model(X), output, atol=1e-6)


def test_blocks_can_be_nested(model):
    with materialized(model):
        with materialized(model):
            assert not is_dispatched(model)
        assert not is_dispatched(model)
    assert is_dispatched(model)


def test_a_block_leaves_a_plain_model_alone():
    model = Tiny()
    before = portrait(model)
    with materialized(model):
        pass
    assert portrait(model) == before


def test_after_a_round_everything_can_be_planned_again(model):
    plan = plan_materialize(model)
    with materialized(model):
        assert plan_materialize(model).tensors == ()
    assert plan_materialize(model) == plan


def test_a_compiled_model_is_restored_through_its_wrapper(tmp_path):
    model = Tiny().eval()
    compiled = torch.compile(model, backend="eager")
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    before = portrait(model)
    materialize_meta_tensors(compiled)
    restore_dispatch(compiled)
    assert portrait(model) == before


@pytest.mark.parametrize("kind", ["dict", "list", "tuple"])
def test_several_models_in_a_container_are_made_whole_and_restored_together(tmp_path, kind):
    models = [dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path / str(i)) for i in range(2)]
    before = [portrait(model) for model in models]
    together = {"a": models[0], "b": models[1]} if kind == "dict" else {"list": list, "tuple": tuple}[kind](models)
    assert materialize_meta_tensors(together) is together
    for model in models:
        assert not is_dispatched(model)
    restore_dispatch(together)
    assert [portrait(model) for model in models] == before


def test_an_object_that_cannot_be_hashed_is_made_whole(model):
    @dataclass
    class Pipe:
        model: nn.Module

    pipe = Pipe(model)
    before = portrait(model)
    materialize_meta_tensors(pipe)
    assert not is_dispatched(pipe)
    restore_dispatch(pipe)
    assert portrait(model) == before
    with pytest.raises(TypeError):
        materialize_meta_tensors(object())


@runs_offloaded_ties
def test_a_model_made_in_inference_mode_is_made_whole_and_restored(tmp_path):
    with torch.inference_mode():
        model = Tied().eval()
        output = model(IDS)
        dispatch_model(model, {"embed": "cpu", "mid": "disk", "head": "disk"}, offload_dir=tmp_path)
        materialize_meta_tensors(model)
        assert model.embed.weight is model.head.weight
        restore_dispatch(model)
        assert torch.allclose(model(IDS), output, atol=1e-6)


def test_check_round_is_whole_after_a_restore(model):
    materialize_meta_tensors(model)
    restore_dispatch(model)
    materialize_meta_tensors(model, keep_dispatch=False)
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR), X)
