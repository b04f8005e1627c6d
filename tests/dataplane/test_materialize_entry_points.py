"""What accelerate's ways of dispatching do beside taking weights away, and that none of it is in the way."""

import copy
from contextlib import closing

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
from dispatched import (
    ACCELERATOR,
    DISK_ONLY,
    IDS,
    SPLIT,
    Holder,
    Nested,
    Root,
    Tied,
    Tiny,
    X,
    assert_moves,
    assert_same,
    assert_whole,
    check_round,
    leftovers,
    portrait,
    state,
    tensors,
)
from safetensors.torch import save_file
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    restore_dispatch,
)
from modelcache.errors import MaterializeError


@pytest.fixture
def sim():
    with closing(SimulatedDevice(1 << 20, link_bytes_per_s=None)) as device:
        yield device


def run(model, x=X):
    with torch.no_grad():
        return model(x)


class Deep(nn.Module):
    """A block that uses weights two levels below without calling anything."""

    def __init__(self):
        super().__init__()
        self.holder, self.scale = Holder(), nn.Parameter(torch.linspace(0, 1, 3))

    def forward(self, x):
        dense = self.holder.dense
        return nn.functional.linear(x * self.scale, dense.weight, dense.bias)


# --- where the data is ---


def test_an_index_is_read_into_ram_and_not_onto_the_device_of_its_loader(tmp_path, sim):
    source = Tiny().eval()
    path = tmp_path / "m.safetensors"
    save_file(source.state_dict(), path)
    model = copy.deepcopy(source)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        for name, _ in model.named_parameters()
    }
    dispatch_model(model, dict.fromkeys(SPLIT, "disk"), main_device="sim:0", offload_index=index, force_hooks=True)
    assert model.linear1._hf_hook.weights_map.dataset.device == "sim:0"
    held, seen = sim.allocated_bytes(), []
    materialize_meta_tensors(model, progress=lambda *_: seen.append(sim.allocated_bytes()))
    assert seen
    assert max(seen) <= held
    assert_whole(model, state(source))


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_preloaded_class_is_found_two_levels_below_its_hook(tmp_path, to_disk):
    def offload(model):
        if to_disk:
            disk_offload(model, tmp_path, ACCELERATOR, preload_module_classes=["Deep"])
        else:
            cpu_offload(model, ACCELERATOR, preload_module_classes=["Deep"])
        assert "_hf_hook" not in vars(model.blocks[0].holder.dense)

    model = nn.Sequential()
    model.blocks = nn.ModuleList([Deep(), Deep()])
    check_round(nn.ModuleDict({"a": model}), lambda holder: offload(holder["a"]))


def test_a_preloaded_class_of_a_dispatch_becomes_whole(tmp_path):
    model = nn.Sequential(Deep(), Deep())
    check_round(
        model,
        lambda m: dispatch_model(
            m, {"0": "cpu", "1": "disk"}, main_device=ACCELERATOR, offload_dir=tmp_path, preload_module_classes=["Deep"]
        ),
        X,
    )


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
def test_a_parameter_mapped_by_name_from_real_weights_becomes_whole(tmp_path):
    places = {"blk.scale": "disk", "blk.lin": "disk", "out": "cpu"}
    model = Nested()
    expected, output = state(model), run(model)
    dispatch_model(model, places, offload_dir=tmp_path)
    assert_whole(materialize_meta_tensors(model), expected)
    assert torch.equal(run(model), output)


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
def test_a_dispatch_that_accelerate_gave_up_leaves_a_model_that_becomes_whole(tmp_path):
    root, all_on_disk = Root(), Tiny().eval()
    for model, places, error in (
        (root, {"scale": "disk", "lin": "disk"}, ValueError),
        (all_on_disk, {"": "disk"}, FileNotFoundError),
    ):
        expected = state(model)
        try:
            dispatch_model(model, places, offload_dir=tmp_path / error.__name__, **DISK_ONLY)
        except error:
            assert_same(materialize_meta_tensors(model).state_dict(), expected)
        else:
            assert_whole(materialize_meta_tensors(model), expected)
        assert_moves(model)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_checkpoint_dispatched_with_its_buffers_becomes_whole(tmp_path, offload_buffers):
    source = Tiny().eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with init_empty_weights():
        model = Tiny().eval()
    load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.safetensors"), {"linear1": "cpu", "batchnorm": "disk", "linear2": "disk"},
        offload_folder=tmp_path / "o", offload_buffers=offload_buffers, dtype=torch.float32,
    )  # fmt: skip
    assert_whole(materialize_meta_tensors(model), state(source))
    restore_dispatch(model, on_modified="error")
    assert torch.allclose(run(model), run(source), atol=1e-6)


def test_a_model_dispatched_three_times_becomes_whole(tmp_path):
    def thrice(model):
        for _ in range(3):
            dispatch_model(model, SPLIT, offload_dir=tmp_path)

    check_round(Tiny().eval(), thrice)


def test_hooks_on_some_modules_only_leave_the_others_alone(tmp_path):
    model = Tiny().eval()
    expected, bias = state(model), model.linear1.bias
    add_hook_to_module(model.linear2, AlignDevicesHook(execution_device=ACCELERATOR, offload=True))
    disk_offload(model.batchnorm, tmp_path, ACCELERATOR)
    assert_whole(materialize_meta_tensors(model), expected)
    assert model.linear1.bias is bias


# --- hooks that move whole models ---


def test_a_chain_of_whole_model_hooks_comes_off_together():
    first, second = Tiny().eval(), Tiny().eval()
    _, hook = cpu_offload_with_hook(first, ACCELERATOR)
    cpu_offload_with_hook(second, ACCELERATOR, prev_module_hook=hook)
    both = {"first": first, "second": second}
    materialize_meta_tensors(both)
    for model in both.values():
        assert_whole(model, state(Tiny()))
    hook.offload()  # what the user still holds does no harm
    assert_whole(first, state(Tiny()))


def test_the_next_model_in_a_chain_may_still_send_a_whole_one_home(sim):
    first, second = Tiny().eval(), Tiny().eval()
    _, hook = cpu_offload_with_hook(first, "sim:0")
    cpu_offload_with_hook(second, "sim:0", prev_module_hook=hook)
    materialize_meta_tensors(first, "sim:0")
    run(second)
    assert {tensor.device.type for tensor in tensors(first).values()} == {"cpu"}
    assert_same(first.state_dict(), state(Tiny()))
    restore_dispatch(first)
    assert isinstance(first._hf_hook, CpuOffload)


# --- buffers, forwards and devices ---


def test_buffers_that_changed_on_the_device_are_not_replaced_by_the_copies_of_the_dispatch(sim):
    model = Tiny().train()
    cpu_offload(model, "sim:0")
    for _ in range(2):
        run(model, X.to("sim:0"))
    mean = model.batchnorm.running_mean.cpu().clone()
    materialize_meta_tensors(model)
    assert int(model.batchnorm.num_batches_tracked) == 2
    assert torch.equal(model.batchnorm.running_mean, mean)
    assert sim.allocated_bytes() == 0


def test_weights_left_on_the_device_by_a_failed_forward_come_back(tmp_path, sim):
    model = Tiny().eval()
    expected = state(model)
    dispatch_model(model, SPLIT, main_device="sim:0", offload_dir=tmp_path)
    forward = model.linear2._old_forward
    model.linear2._old_forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(model, X.to("sim:0"))
    model.linear2._old_forward = forward
    assert model.linear2.weight.device.type == "sim"
    assert_whole(materialize_meta_tensors(model), expected)
    assert sim.allocated_bytes() == 0


def test_a_forward_on_meta_weights_gives_no_error_and_no_answer():
    """Why whole means that no tensor is on meta and every weight is equal, and not that a forward returns."""
    model = nn.Linear(3, 4)
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    output = nn.functional.linear(X, empty.weight)
    assert output.device == X.device
    assert output.shape == model(X).shape
    assert is_dispatched(empty)


def test_arguments_of_the_dispatch_come_back_with_it(tmp_path, sim):
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x, *, note=None):
            self.seen = note.device
            return self.linear(x)

    model = Keyed()
    dispatch_model(
        model, {"linear": "disk"}, main_device="sim:0", offload_dir=tmp_path, skip_keys=["note"], force_hooks=True
    )
    for _ in range(2):
        with torch.no_grad():
            output = model(X, note=torch.zeros(1))
        assert model.seen.type == "cpu"  # not moved with the other inputs
        assert output.device.type == "cpu"  # moved back to where the inputs were
        assert torch.allclose(output, whole(model, X), atol=1e-6)


def whole(model, x):
    with materialized(model), torch.no_grad():
        return model(x, note=torch.zeros(1))


# --- folders ---


def test_a_folder_of_a_model_of_another_shape_is_named(tmp_path):
    first, second = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 5))
    for model in (first, second):
        dispatch_model(
            model, {"0": "disk"}, offload_dir=tmp_path, **DISK_ONLY
        )  # the second keeps the index that it finds
    before = portrait(second)
    with pytest.raises(MaterializeError, match=r"shape \(4, 3\), the model wants \(5, 3\)") as caught:
        materialize_meta_tensors(second)
    assert set(caught.value.names) == {"0.weight", "0.bias"}
    assert portrait(second) == before


def test_a_folder_with_weights_of_the_same_shape_gives_what_the_dispatched_model_ran_with(tmp_path):
    first, second = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    for model in (first, second):
        dispatch_model(model, {"0": "disk"}, offload_dir=tmp_path, **DISK_ONLY)
    output = run(second)
    materialize_meta_tensors(second)
    assert torch.equal(run(second), output)
    # A dispatch that was recorded tells them apart: modelcache.dispatch_model refuses such a folder.


# --- ties ---


@pytest.mark.parametrize("forwards", [0, 1, 5])
@pytest.mark.parametrize("places", ["cpu", "disk"])
def test_a_tie_of_three_is_one_tensor_again_beside_equal_norms(tmp_path, places, forwards):
    class Three(Tied):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])
            self.third = nn.Linear(6, 11, bias=False)
            self.third.weight = self.embed.weight

        def forward(self, ids):
            x = self.mid(self.embed(ids))
            return self.head(self.norms[0](x)) + self.third(self.norms[1](x))

    model = Three().eval()
    expected, output = state(model), run(model, IDS)
    names = ["embed", "mid", "head", "third", "norms"]
    dispatch_model(model, dict.fromkeys(names, places), main_device=ACCELERATOR, offload_dir=tmp_path, force_hooks=True)
    for _ in range(forwards):
        run(model, IDS)  # leaves addresses of freed memory in the record of ties
    materialize_meta_tensors(model)
    assert_whole(model, expected)
    assert model.head.weight is model.embed.weight is model.third.weight
    assert model.norms[0].weight is not model.norms[1].weight
    assert torch.allclose(run(model, IDS), output, atol=1e-5)


def test_two_ties_of_equal_content_stay_two(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "abcd"})
    with torch.no_grad():
        for linear in model.values():
            linear.weight.fill_(1)
    model["b"].weight, model["d"].weight = model["a"].weight, model["c"].weight
    model.all_tied_weights_keys = {"b.weight": "a.weight", "d.weight": "c.weight"}
    dispatch_model(model, dict.fromkeys("abcd", "disk"), offload_dir=tmp_path, **DISK_ONLY)
    materialize_meta_tensors(model)
    assert model["a"].weight is model["b"].weight
    assert model["c"].weight is model["d"].weight
    assert model["a"].weight is not model["c"].weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tie_survives_a_change_of_dtype_while_dispatched(tmp_path, dtype):
    model = Tied().eval()
    weight = model.embed.weight.detach().to(dtype)
    dispatch_model(model, {"embed": "disk", "mid": "cpu", "head": "disk"}, offload_dir=tmp_path)
    model._apply(lambda tensor: tensor.to(dtype))
    materialize_meta_tensors(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, weight)


def test_a_buffer_that_two_modules_share_is_one_buffer_again():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
    model["b"].running_mean = model["a"].running_mean
    cpu_offload(model, ACCELERATOR, offload_buffers=True)
    materialize_meta_tensors(model)
    assert leftovers(model) == {}
    with torch.no_grad():
        model["a"].running_mean.add_(1)
    assert model["b"].running_mean.tolist() == [1, 1, 1]
