"""What is asked of a model at the wrong time, in the wrong words, or by two at once."""

import copy
import pickle
import threading
from contextlib import closing

import pytest
import torch
from accelerate import dispatch_model
from dispatched import SPLIT, Tiny, assert_whole, portrait, state
from movers import Rig
from torch import nn

import modelcache
from modelcache import ModelCache
from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    plan_materialize,
    restore_dispatch,
)
from modelcache.errors import MaterializeError


def dispatched(folder):
    model = Tiny().eval()
    dispatch_model(model, SPLIT, offload_dir=folder)
    return model


# --- models in a cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vram", ["64KiB", "3KiB"], ids=["whole", "from its dispatch"])
def test_a_model_in_a_cache_is_left_to_the_cache(tmp_path, vram):
    places = {"0": "sim:0", "1": "cpu", "2": "disk"}

    def load():
        net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        return modelcache.dispatch_model(net, places, offload_dir=str(tmp_path))

    with ModelCache(device="simulated", vram=vram, ram="1MiB", progress=False) as cache:
        cache.register("net", load)
        handle = cache.get("net")
        x = torch.ones(1, 16)
        answer = handle(x).cpu()
        for call in (
            lambda: materialize_meta_tensors(handle),
            lambda: materialize_meta_tensors(modelcache.unwrap(handle)),
            handle.materialize,
            lambda: restore_dispatch(handle),
            lambda: materialized(handle).__enter__(),
        ):
            with pytest.raises(MaterializeError, match=r"is in a cache.*call cache\.park\("):
                call()
        assert torch.allclose(handle(x).cpu(), answer)
        cache.park("net")
        assert torch.allclose(handle(x).cpu(), answer)


def test_a_copy_of_a_model_in_a_cache_is_nobodys(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        (part,) = rig.load(Tiny).parts
        rig.stage(part.part)
        for twin in (copy.deepcopy(rig.mover.object_of("m")), pickle.loads(pickle.dumps(rig.mover.object_of("m")))):
            assert materialize_meta_tensors(twin) is twin


# --- data that is elsewhere by now ------------------------------------------------------------------------------------


def test_a_file_that_is_gone_is_looked_for_where_the_caller_says(tmp_path):
    expected = state(Tiny())
    model = dispatched(tmp_path / "o")
    (tmp_path / "o" / "linear2.weight.dat").unlink()
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("linear2.weight",)
    assert dict(plan_materialize(model, extra_sources=expected).problems) == {}
    materialize_meta_tensors(model, extra_sources=expected)
    assert_whole(model, expected)


def test_what_the_caller_gives_instead_must_fit_too(tmp_path):
    model = dispatched(tmp_path)
    (tmp_path / "linear2.weight.dat").unlink()
    before = portrait(model)
    with pytest.raises(MaterializeError, match=r"linear2\.weight"):
        materialize_meta_tensors(model, extra_sources={"linear2.weight": torch.ones(2, 2)})
    assert portrait(model) == before


# --- blocks of several ------------------------------------------------------------------------------------------------


def test_the_last_block_to_end_puts_the_dispatch_back(tmp_path):
    model = dispatched(tmp_path)
    inside, may_end = threading.Event(), threading.Event()

    def other():
        with materialized(model):
            inside.set()
            may_end.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with materialized(model):
        may_end.set()
        thread.join()
        model.to("cpu")
    assert is_dispatched(model)


def test_many_threads_with_blocks_of_one_model_meet_no_error(tmp_path):
    model = dispatched(tmp_path)
    failed = []

    def work():
        try:
            for _ in range(10):
                with materialized(model) as whole:
                    whole.to("cpu")
        except Exception as error:  # said by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert is_dispatched(model)


def test_a_block_inside_another_ends_nothing(tmp_path):
    model = dispatched(tmp_path)
    with materialized(model):
        with materialized(model):
            pass
        assert not is_dispatched(model)
    assert is_dispatched(model)


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_wrong_word_is_refused_before_the_block_begins(tmp_path):
    model = dispatched(tmp_path)
    before = portrait(model)
    with pytest.raises(ValueError, match="on_modified must be"):
        materialized(model, on_modified="maybe").__enter__()
    with pytest.raises(ValueError, match="on_modified must be"):
        materialized(Tiny(), on_modified="maybe").__enter__()
    assert portrait(model) == before


@pytest.mark.parametrize("device", ["gpu", "auto", None, {"": "cpu"}, "", "cuda:77"])
def test_a_target_that_is_no_device_is_named(tmp_path, device):
    model = dispatched(tmp_path)
    with pytest.raises(ValueError, match="target_device"):
        materialize_meta_tensors(model, device)
    assert is_dispatched(model)


def test_what_there_is_to_restore_is_said_for_each_case(tmp_path):
    model = dispatched(tmp_path)
    with pytest.raises(MaterializeError, match="it is dispatched as it is"):
        restore_dispatch(model)
    materialize_meta_tensors(model)
    with pytest.raises(MaterializeError, match="is a copy of a model that was"):
        restore_dispatch(copy.deepcopy(model))
    restore_dispatch(model)
    with pytest.raises(MaterializeError, match="it is dispatched as it is"):
        restore_dispatch(model)
