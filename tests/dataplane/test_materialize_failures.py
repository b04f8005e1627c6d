"""Whatever goes wrong, wherever: the model is exactly as it was, and works."""

import copy
import itertools
import threading
from collections.abc import Mapping

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, attach_align_device_hook
from dispatched import ACCELERATOR, DISK_ONLY, SPLIT, Tiny, X, assert_moves, assert_whole, meta_names, portrait, state
from safetensors.torch import save_file
from torch import nn

from modelcache.dataplane.materialize import entry_points as materialize
from modelcache.dataplane.materialize.entry_points import materialize_meta_tensors
from modelcache.errors import MaterializeError, MaterializeMemoryError

NUM_OFFLOADED = 6  # the parameters of Tiny


@pytest.fixture
def model(tmp_path):
    """Dispatched to disk whole, with what a forward leaves behind."""
    model = Tiny().eval()
    disk_offload(model, tmp_path, ACCELERATOR)
    model(X)
    return model


class Unchanged:
    """Holds that a block changed nothing on a model, that it still runs, and that it can be made whole later."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before, self.output, self.expected = portrait(self.model), Tiny().eval()(X), state(Tiny())

    def __exit__(self, *exc):
        assert portrait(self.model) == self.before
        assert torch.allclose(self.model(X), self.output, atol=1e-6)
        assert meta_names(self.model)
        materialize_meta_tensors(self.model)
        assert_whole(self.model, self.expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("position", range(NUM_OFFLOADED))
def test_an_interrupt_at_any_tensor_leaves_the_model_as_it_was(model, position, error):
    calls = itertools.count()

    def stop(done, total, name):
        if next(calls) == position:
            raise error

    with Unchanged(model), pytest.raises(error):
        materialize_meta_tensors(model, progress=stop)


@pytest.mark.parametrize("position", range(NUM_OFFLOADED))
def test_a_file_cut_short_at_any_tensor_is_named_before_anything_is_read(model, tmp_path, position):
    name = [name for name, _ in model.named_parameters()][position]
    path = tmp_path / f"{name}.dat"
    data = path.read_bytes()
    before, seen = portrait(model), []
    path.write_bytes(data[:-1])
    with pytest.raises(MaterializeError, match=f"{name}.dat") as caught:
        materialize_meta_tensors(model, progress=lambda *report: seen.append(report))
    assert caught.value.names == (name,)
    assert seen == []
    assert portrait(model) == before
    path.write_bytes(data)
    with Unchanged(model):
        pass


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("position", range(NUM_OFFLOADED))
def test_a_file_that_vanishes_between_plan_and_reading_is_named(model, tmp_path, monkeypatch, position, workers):
    name = [name for name, _ in model.named_parameters()][position]
    path = tmp_path / f"{name}.dat"
    data = path.read_bytes()
    # The memory check is the last thing before reading.
    monkeypatch.setattr(materialize, "available_bytes", lambda device: path.unlink(missing_ok=True) or 1 << 40)
    before = portrait(model)
    with pytest.raises(MaterializeError, match=f"{name}.dat") as caught:
        materialize_meta_tensors(model, num_workers=workers)
    assert caught.value.names == (name,)
    assert portrait(model) == before
    monkeypatch.undo()
    path.write_bytes(data)
    with Unchanged(model):
        pass


class Breaking(dict):
    """A table of tensors that fails at one of its writes."""

    def __init__(self, content, key, error):
        super().__init__(content)
        self.key, self.error = key, error

    def __setitem__(self, key, value):
        if key == self.key and not value.is_meta:
            raise self.error
        super().__setitem__(key, value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("child", ["linear1", "batchnorm", "linear2"])
def test_a_commit_that_fails_at_any_tensor_is_undone(model, child, key, error):
    module = getattr(model, child)
    plain = module._parameters
    vars(module)["_parameters"] = Breaking(plain, key, error)
    before = portrait(model)
    with pytest.raises(error):
        materialize_meta_tensors(model)
    assert portrait(model) == before
    vars(module)["_parameters"] = plain
    with Unchanged(model):
        pass


def test_a_model_that_would_not_be_whole_is_put_back(model, monkeypatch):
    monkeypatch.setattr(materialize.state, "unhooking", lambda module: [])
    with Unchanged(model):
        with pytest.raises(MaterializeError, match="please report"):
            materialize_meta_tensors(model)
        monkeypatch.undo()


def test_too_little_memory_is_said_before_anything_is_read(model, monkeypatch):
    seen = []
    with Unchanged(model):
        monkeypatch.setattr(materialize, "available_bytes", lambda device: 10)
        with pytest.raises(MaterializeMemoryError) as caught:
            materialize_meta_tensors(model, progress=lambda *report: seen.append(report))
        assert isinstance(caught.value, MemoryError)
        assert (caught.value.needed_bytes, caught.value.available_bytes) == (196, 10)
        assert len(caught.value.names) == NUM_OFFLOADED
        assert "196 B on cpu" in str(caught.value)
        assert seen == []
        monkeypatch.undo()


def test_the_memory_check_can_be_turned_off(model, monkeypatch):
    monkeypatch.setattr(materialize, "available_bytes", lambda device: 10)
    materialize_meta_tensors(model, check_memory=False)
    assert_moves(model)


def test_weights_shared_with_the_dispatch_need_no_memory(monkeypatch):
    model = Tiny().eval()
    cpu_offload(model, ACCELERATOR)
    monkeypatch.setattr(materialize, "available_bytes", lambda device: 10)
    materialize_meta_tensors(model)
    assert_moves(model)


def test_weights_that_were_never_loaded_are_all_named():
    with init_empty_weights(include_buffers=True):
        model = Tiny()
    model.batchnorm.register_buffer("passing", torch.empty(1, device="meta"), persistent=False)
    before = portrait(model)
    with pytest.raises(MaterializeError, match="no data is known") as caught:
        materialize_meta_tensors(model)
    assert set(caught.value.names) == set(meta_names(model))
    assert len(caught.value.names) == 10
    assert portrait(model) == before


def test_lazy_parameters_on_meta_are_named_and_others_are_left_alone():
    with torch.device("meta"):
        empty = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(empty)
    assert caught.value.names == ("0.weight", "0.bias")
    real = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    materialize_meta_tensors(real)
    real(X)


def test_a_placeholder_of_another_shape_is_named(tmp_path):
    model = Tiny().eval()
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    model.linear2._parameters["weight"] = nn.Parameter(torch.empty(7, 4, device="meta"))
    with pytest.raises(MaterializeError, match=r"shape \(5, 4\), the model wants \(7, 4\)") as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("linear2.weight",)


@pytest.mark.parametrize("damage", ["cut", "gone", "renamed", "no safetensors"])
def test_a_damaged_checkpoint_is_named_with_every_tensor(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    model = Tiny().eval()
    save_file(model.state_dict(), path)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        for name, _ in model.named_parameters()
    }
    dispatch_model(model, dict.fromkeys(SPLIT, "disk"), offload_index=index, **DISK_ONLY)
    before = portrait(model)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-5])
        case "gone":
            path.unlink()
        case "renamed":
            save_file({name + "_": tensor for name, tensor in Tiny().state_dict().items()}, path)
        case _:
            path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(MaterializeError, match="m.safetensors") as caught:
        materialize_meta_tensors(model)
    assert set(caught.value.names) == set(index)
    assert portrait(model) == before


def test_a_mapping_that_fails_or_lies_is_named():
    class Moody(Mapping):
        def __init__(self, weights, answer):
            self.weights, self.answer = weights, answer

        def __getitem__(self, key):
            if key == "linear2.bias":
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer
            return self.weights[key]

        def __contains__(self, key):
            return key in self.weights

        def __iter__(self):
            return iter(self.weights)

        def __len__(self):
            return len(self.weights)

    for answer in (OSError("the net is down"), torch.zeros(3), torch.empty(5, device="meta"), None):
        model = Tiny().eval()
        weights = Moody(state(model), torch.zeros(5))
        attach_align_device_hook(model, execution_device=ACCELERATOR, offload=True, weights_map=weights)
        weights.answer = answer
        before = portrait(model)
        with pytest.raises(MaterializeError) as caught:
            materialize_meta_tensors(model)
        assert caught.value.names == ("linear2.bias",)
        assert portrait(model) == before


def test_weights_in_a_table_of_another_library_are_refused(model):
    class Cache(dict):
        pass

    from collections import UserDict

    class Table(UserDict):
        pass

    other = nn.Linear(2, 2)
    vars(other)["_parameters"] = Table(other._parameters)
    holder = nn.ModuleDict({"a": model, "b": nn.Identity()})
    holder._modules["b"] = other
    before = portrait(model)
    with pytest.raises(MaterializeError, match="module 'b' keeps its weights in a Table of another library"):
        materialize_meta_tensors(holder)
    assert portrait(model) == before


def test_an_offloader_that_we_do_not_know_is_refused(model):
    class CustomOffloadHook(ModelHook):
        pass

    add_hook_to_module(model.linear1, CustomOffloadHook(), append=True)
    before = portrait(model)
    with pytest.raises(MaterializeError, match="CustomOffloadHook"):
        materialize_meta_tensors(model)
    assert portrait(model) == before


def test_progress_may_not_materialize_the_same_model_again(model):
    def again(done, total, name):
        materialize_meta_tensors(model)

    with Unchanged(model), pytest.raises(MaterializeError, match="by this very thread"):
        materialize_meta_tensors(model, progress=again)


def test_progress_may_materialize_another_model(model, tmp_path):
    other = Tiny().eval()
    disk_offload(other, tmp_path, ACCELERATOR)
    materialize_meta_tensors(model, progress=lambda *_: materialize_meta_tensors(other))
    assert_whole(model, state(Tiny()))
    assert_whole(other, state(Tiny()))


def test_many_threads_on_one_model_make_it_whole_once(model):
    expected = state(Tiny())
    barrier = threading.Barrier(6)
    found, errors = [], []

    def run():
        barrier.wait()
        try:
            materialize_meta_tensors(model, copy="always")
            found.append({name: id(parameter) for name, parameter in model.named_parameters()})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(each == found[0] for each in found)
    assert_whole(model, expected)


def test_no_thread_is_left_behind_after_a_failure(model, tmp_path):
    wide = nn.ModuleList(nn.Linear(8, 8) for _ in range(140))
    disk_offload(wide, tmp_path / "wide", ACCELERATOR)

    def stop(done, total, name):
        raise KeyboardInterrupt

    for workers in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            materialize_meta_tensors(wide, progress=stop, num_workers=workers)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("modelcache-read")]


def test_a_failed_copy_of_a_model_does_not_touch_the_original(tmp_path):
    model = Tiny().eval()
    disk_offload(model, tmp_path, ACCELERATOR)
    twin = copy.deepcopy(model)
    (tmp_path / "linear1.bias.dat").unlink()
    before = portrait(model), portrait(twin)
    with pytest.raises(MaterializeError):
        materialize_meta_tensors(twin)
    assert (portrait(model), portrait(twin)) == before


def test_a_hook_without_data_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    add_hook_to_module(model[0], AlignDevicesHook(execution_device=ACCELERATOR, offload=True, weights_map={}))
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("0.weight", "0.bias")
