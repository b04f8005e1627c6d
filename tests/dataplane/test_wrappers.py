"""Tensor subclasses that wrap other tensors travel by their inner tensors, as the same objects."""

from contextlib import closing

import pytest
import torch
from movers import Rig
from torch.utils import _pytree as pytree


class Scaled(torch.Tensor):
    """A tensor kept as int8 values and a scale."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    def plain(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values.detach(), args[0].scale.detach())
        args, kwargs = pytree.tree_map_only(cls, lambda x: x.plain(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Outer(Scaled):
    """A wrapper around a wrapper."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"])

    def plain(self):
        return self.inner.plain()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner.detach())
        args, kwargs = pytree.tree_map_only(Scaled, lambda x: x.plain(), (args, kwargs or {}))
        return func(*args, **kwargs)


def scaled():
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-99, 99, (8, 16), dtype=torch.int8, generator=generator)
    return Scaled(values, torch.rand(8, 1, generator=generator))


def quantized(wrap):
    layer = torch.nn.Linear(16, 8)
    torch.nn.init.ones_(layer.bias)
    layer.weight = torch.nn.Parameter(wrap(), requires_grad=False)
    return layer


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        yield rig


@pytest.mark.parametrize("wrap", [scaled, lambda: Outer(scaled())], ids=["one", "nested"])
def test_a_wrapped_weight_round_trips_through_every_tier(rig, wrap):
    (part,) = rig.load(lambda: quantized(wrap)).parts
    model = rig.mover.object_of("m")
    weight = model.weight
    x = torch.ones(1, 16)
    expected = torch.nn.functional.linear(x, wrap().plain(), model.bias)
    rig.stage(part.part)
    assert weight.device.type == "cpu"
    rig.promote(part.part)
    assert model.weight is weight
    assert isinstance(weight, torch.nn.Parameter)
    assert isinstance(weight, Scaled)
    assert weight.device.type == "sim"
    with torch.no_grad():
        assert torch.allclose(model(x.to("sim:0")).cpu(), expected)
    rig.park(part.part)
    assert weight.device.type == "cpu"
    rig.promote(part.part)
    rig.spill(part.part)
    rig.stage(part.part)
    assert torch.equal(model.weight.plain(), wrap().plain())
    assert model.weight is weight


def test_a_write_to_an_inner_tensor_is_seen(rig):
    (part,) = rig.load(lambda: quantized(scaled)).parts
    model = rig.mover.object_of("m")
    rig.stage(part.part)
    rig.promote(part.part)
    model.weight.scale.data += 1
    assert rig.park(part.part).written
    assert torch.equal(model.weight.scale, scaled().scale + 1)


def test_a_torchao_model_round_trips(rig):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)

    def make():
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    (part,) = rig.load(make).parts
    model, x = rig.mover.object_of("m"), torch.ones(2, 64)
    with torch.no_grad():
        expected = make()(x)
        rig.stage(part.part)
        rig.promote(part.part)
        assert model[0].weight.device.type == "sim"
        assert torch.allclose(model(x.to("sim:0")).cpu(), expected, atol=1e-5)
        rig.spill(part.part)
        rig.stage(part.part)
        assert torch.equal(model[0].weight.qdata, make()[0].weight.qdata)
