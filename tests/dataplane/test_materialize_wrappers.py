"""Dispatched models inside or around compiled, data-parallel, scripted, traced and parametrized modules."""

import importlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dispatched import (
    ACCELERATOR,
    SPLIT,
    Tiny,
    X,
    assert_same,
    assert_whole,
    leftovers,
    meta_names,
    portrait,
    state,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    restore_dispatch,
)
from modelcache.errors import MaterializeError


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_child_keeps_its_wrapper(tmp_path, when):
    model = Tiny().eval()
    output = run(model)
    if when == "before":
        model.linear2 = torch.compile(model.linear2, backend="eager")
    expected = state(model)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    if when == "after":
        model.linear2 = torch.compile(model.linear2, backend="eager")
        expected = {name.replace("linear2.", "linear2._orig_mod."): t for name, t in expected.items()}
    wrapper = model.linear2
    assert meta_names(model) == ["linear2._orig_mod.weight", "linear2._orig_mod.bias"]
    for _ in range(2):
        materialize_meta_tensors(model)
        assert model.linear2 is wrapper
        assert meta_names(model) == []
        assert not is_dispatched(model)
        assert_same(model.state_dict(), expected)
        assert torch.allclose(run(model), output, atol=1e-6)
        restore_dispatch(model)
        assert wrapper._orig_mod.weight.is_meta


def test_a_compiled_model_is_the_same_model_as_its_original(tmp_path):
    model = Tiny().eval()
    expected = state(model)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    compiled = torch.compile(model, backend="eager")
    materialize_meta_tensors(compiled)
    assert_whole(model, expected)
    restore_dispatch(model)
    assert is_dispatched(compiled)
    with materialized(model):
        assert meta_names(compiled) == []


def test_a_data_parallel_model_becomes_whole(tmp_path, monkeypatch):
    # Without an accelerator it moves nothing; other tests leave a simulated one in this process.
    module = importlib.import_module("torch.nn.parallel.data_parallel")
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)
    model = Tiny().eval()
    expected = state(model)
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    wrapped = nn.DataParallel(model)
    materialize_meta_tensors(wrapped)
    assert_whole(model, expected)
    wrapped.to(torch.float64)
    wrapped.to(torch.float32)
    restore_dispatch(wrapped, on_modified="error")
    assert meta_names(wrapped) == ["module.linear2.weight", "module.linear2.bias"]


@pytest.mark.parametrize("norm", ["weight", "orthogonal", "spectral"])
def test_a_parametrized_weight_is_computed_from_its_whole_parts(tmp_path, norm):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    kind = {"weight": "weight_norm", "orthogonal": "orthogonal", "spectral": "spectral_norm"}[norm]
    getattr(parametrizations, kind)(model[1])
    output, expected = run(model), state(model)
    disk_offload(model, tmp_path, ACCELERATOR)
    assert any("parametrizations" in name for name in meta_names(model))
    materialize_meta_tensors(model)
    assert_same(model.state_dict(), expected)
    assert leftovers(model) == {}
    assert torch.allclose(run(model), output, atol=1e-6)
    parametrize.remove_parametrizations(model[1], "weight")
    assert torch.allclose(run(model), output, atol=1e-6)


def test_a_traced_model_is_restored_with_the_forward_of_its_class():
    model = torch.fx.symbolic_trace(Tiny().eval())
    output, forward = run(model), type(model).forward
    cpu_offload(model, ACCELERATOR)
    hooked = type(model).forward
    materialize_meta_tensors(model)
    assert type(model).forward is forward
    restore_dispatch(model)
    assert type(model).forward is hooked
    assert torch.allclose(run(model), output, atol=1e-6)
    other = torch.fx.symbolic_trace(Tiny().eval())
    assert type(other).forward is not hooked


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_part_is_refused_by_name_and_nothing_is_touched():
    model = nn.ModuleDict({"plain": nn.Linear(3, 3), "scripted": torch.jit.script(nn.Linear(3, 3))})
    cpu_offload(model["plain"], ACCELERATOR)
    before = portrait(model["plain"])
    with pytest.raises(MaterializeError, match="'scripted'"):
        materialize_meta_tensors(model)
    assert portrait(model["plain"]) == before


def test_state_dict_hooks_and_optimizers_see_the_weights(tmp_path):
    model = Tiny()
    dispatch_model(model, SPLIT, offload_dir=tmp_path)
    materialize_meta_tensors(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    before = state(model)
    model(X).sum().backward()
    optimizer.step()
    assert seen == ["saved"]
    assert not torch.equal(model.linear2.weight, before["linear2.weight"])
    changed = state(model)
    restore_dispatch(model)
    assert_same(materialize_meta_tensors(model).state_dict(), changed)
