"""Models split over an accelerator, RAM and disk, made whole in RAM or on the accelerator."""

from collections import UserDict
from contextlib import closing

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook
from dispatched import IDS, REFUSES, Tied, Tiny, X, assert_same, assert_stuck, assert_whole, portrait, state, tensors
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize.entry_points import (
    materialize_meta_tensors,
    materialized,
    plan_materialize,
    restore_dispatch,
)
from modelcache.errors import MaterializeMemoryError

SPLIT = {"linear1": "sim:0", "batchnorm": "cpu", "linear2": "disk"}
CAPACITY = 1 << 20


@pytest.fixture
def sim():
    with closing(SimulatedDevice(CAPACITY, link_bytes_per_s=None)) as device:
        yield device


def devices(model):
    return {str(tensor.device) for tensor in tensors(model).values()}


def on_device(model, x):
    with torch.no_grad():
        return model(x.to("sim:0")).cpu()


def test_a_model_split_over_three_places_is_parked_in_ram(tmp_path, sim):
    model = Tiny().eval()
    expected, output = state(model), model(X)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    assert devices(model) == {"sim:0", "meta"}
    assert torch.allclose(on_device(model, X), output, atol=1e-6)
    with pytest.raises(RuntimeError, match=REFUSES):
        model.to("cpu")
    assert_stuck(model)
    parameter = model.linear1.weight
    materialize_meta_tensors(model)
    assert model.linear1.weight is parameter
    assert devices(model) == {"cpu"}
    assert sim.allocated_bytes() == 0
    assert_whole(model, expected)
    assert torch.allclose(model(X), output, atol=1e-6)


def test_a_model_is_made_whole_on_the_accelerator(tmp_path, sim):
    model = Tiny().eval()
    expected, output = state(model), model(X)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    materialize_meta_tensors(model, "sim")
    assert devices(model) == {"sim:0"}
    assert torch.allclose(on_device(model, X), output, atol=1e-6)
    model.to("cpu")
    assert_whole(model, expected)


def test_restoring_brings_back_what_was_on_the_accelerator_as_it_is_now(tmp_path, sim):
    model = Tiny().eval()
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    places = {name: tensor.device for name, tensor in tensors(model).items()}
    with materialized(model), torch.no_grad():
        model.linear1.weight.add_(1)
        model.linear2.weight.add_(1)
        expected, output = state(model), model(X)
    assert {name: tensor.device for name, tensor in tensors(model).items()} == places
    assert torch.allclose(on_device(model, X), output, atol=1e-6)
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_model_moved_to_the_accelerator_meanwhile_is_restored(tmp_path, sim):
    model = Tiny().eval()
    output = model(X)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    materialize_meta_tensors(model)
    model.to("sim:0")
    restore_dispatch(model, on_modified="error")
    assert model.linear2.weight.is_meta
    assert torch.allclose(on_device(model, X), output, atol=1e-6)


def test_a_second_call_only_moves_and_keeps_the_dispatch(tmp_path, sim):
    model = Tiny().eval()
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    before = {name: str(tensor.device) for name, tensor in tensors(model).items()}
    materialize_meta_tensors(model)
    materialize_meta_tensors(model, "sim:0")
    assert devices(model) == {"sim:0"}
    materialize_meta_tensors(model)
    restore_dispatch(model)
    assert {name: str(tensor.device) for name, tensor in tensors(model).items()} == before


@pytest.mark.parametrize("target", ["cpu", "sim:0"])
@pytest.mark.parametrize("forwards", [0, 2])
@pytest.mark.parametrize("head", ["sim:0", "cpu", "disk"])
@pytest.mark.parametrize("embed", ["sim:0", "cpu", "disk"])
def test_a_tie_is_one_tensor_again(tmp_path, sim, embed, head, forwards, target):
    model = Tied().eval()
    weight, output = model.embed.weight.detach().clone(), model(IDS)
    dispatch_model(model, {"embed": embed, "mid": "sim:0", "head": head}, main_device="sim:0", offload_dir=tmp_path)
    for _ in range(forwards):
        on_device(model, IDS)
    materialize_meta_tensors(model, target)
    assert model.embed.weight is model.head.weight
    assert devices(model) == {target}
    assert torch.equal(model.embed.weight.cpu(), weight)
    with torch.no_grad():
        assert torch.allclose(model(IDS.to(target)).cpu(), output, atol=1e-6)


def test_views_of_one_memory_move_together(sim):
    both = torch.arange(6.0)
    model = nn.ParameterDict({"a": nn.Parameter(both[:3]), "b": nn.Parameter(both[2:])})
    materialize_meta_tensors(model, "sim:0")
    with torch.no_grad():
        model["a"][2] = 70
    assert model["b"].cpu().tolist() == [70, 3, 4, 5]
    materialize_meta_tensors(model)
    with torch.no_grad():
        model["b"][0] = 80
    assert model["a"].tolist() == [0, 1, 80]


def test_gradients_move_with_their_parameters(tmp_path, sim):
    model = Tiny()
    gradient = torch.randn(5, 4)
    model.linear2.weight.grad = gradient.clone()
    materialize_meta_tensors(model, "sim:0")
    assert model.linear2.weight.grad.device == torch.device("sim:0")
    materialize_meta_tensors(model)
    assert torch.equal(model.linear2.weight.grad, gradient)


def test_a_device_too_small_is_said_before_anything_is_read(tmp_path, sim):
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    disk_offload(model, tmp_path, "sim:0")
    before, seen = portrait(model), []
    with pytest.raises(MaterializeMemoryError) as caught:
        materialize_meta_tensors(model, "sim:0", progress=lambda *report: seen.append(report))
    assert caught.value.needed_bytes == plan_materialize(model, "sim:0").needed_bytes == 2 * (512 * 512 + 512) * 4
    assert caught.value.available_bytes <= CAPACITY
    assert seen == []
    assert portrait(model) == before


def test_a_device_that_refuses_midway_leaves_the_model_as_it_was(tmp_path, sim):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(512, 512))
    expected = state(model)
    disk_offload(model, tmp_path, "sim:0")
    before, seen = portrait(model), []
    with pytest.raises(torch.OutOfMemoryError):
        materialize_meta_tensors(model, "sim:0", check_memory=False, progress=lambda *report: seen.append(report))
    assert seen
    assert portrait(model) == before
    assert sim.allocated_bytes() == 0
    assert_whole(materialize_meta_tensors(model), expected)


def test_an_interrupt_at_any_tensor_leaves_everything_where_it_was(tmp_path, sim):
    model = Tiny().eval()
    output = model(X)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    before, held = portrait(model), sim.allocated_bytes()
    for position in range(9):
        calls = iter(range(9))

        def stop(done, total, name, calls=calls, position=position):
            if next(calls) == position:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            materialize_meta_tensors(model, progress=stop)
        assert portrait(model) == before
        assert sim.allocated_bytes() == held
    assert torch.allclose(on_device(model, X), output, atol=1e-6)


def test_weights_shared_with_the_dispatch_are_copied_to_the_accelerator(sim):
    model = Tiny().eval()
    expected = state(model)
    cpu_offload(model, "sim:0")
    materialize_meta_tensors(model, "sim:0")
    assert devices(model) == {"sim:0"}
    model.cpu()
    assert_same(model.state_dict(), expected)


def test_weights_of_a_foreign_mapping_and_of_a_folder_arrive_on_the_accelerator(tmp_path, sim):
    model, folder = Tiny().eval(), Tiny().eval()
    expected = state(model)
    attach_align_device_hook(model, execution_device="sim:0", offload=True, weights_map=UserDict(state(model)))
    disk_offload(folder, tmp_path, "sim:0")
    for one in (model, folder):
        materialize_meta_tensors(one, "sim:0")
        assert devices(one) == {"sim:0"}
        one.cpu()
        assert_whole(one, expected)
