"""The round trips of `tools/accelerate_own_tests.py` notice what they are there to notice."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from dispatched import ACCELERATOR, SPLIT, Tied, Tiny
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="the tools are only in a checkout")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module("round_trip_plugin")
    for name in ("round_trip_plugin", "wrapping"):
        del sys.modules[name]


@pytest.fixture
def trip(plugin, tmp_path):
    """Dispatch a model and take it on its way; gives the line of the report."""

    def travel(model):
        truth, ties = plugin._clones(model), plugin._ties(model)
        if isinstance(model, Tiny):
            dispatch_model(model, SPLIT, main_device=ACCELERATOR, offload_dir=tmp_path)
        else:
            cpu_offload(model, ACCELERATOR)
        line = plugin.Trip("test", "function")
        plugin.round_trip(model, truth, ties, torch.device("cpu"), line)
        return line

    return travel


def test_a_trip_counts_what_was_made_real(trip):
    line = trip(Tiny().eval())
    assert (line.num_tensors, line.num_bytes, line.has_no_room) == (6, 196, False)


def after(real, fault):
    """`real`, and then something goes wrong."""

    def faulty(model, *args, **kwargs):
        real(model, *args, **kwargs)
        with torch.no_grad():
            fault(model)
        return model

    return faulty


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda m: m.linear2.weight.view(-1)[3].add_(1e-6), "linear2.weight is not what it was"),
        (lambda m: m.batchnorm.running_var.mul_(2), "batchnorm.running_var is not what it was"),
        (lambda m: m.linear1.half(), "linear1.weight is not what it was"),
        (lambda m: m.linear1.to("meta"), "linear1.weight is on meta"),
        (lambda m: setattr(m, "hf_device_map", {}), "a device map is left on ''"),
        (lambda m: setattr(m.linear1, "_old_forward", m.linear1.forward), "a wrapped forward is left on 'linear1'"),
    ],
    ids=["value", "buffer", "dtype", "meta", "device map", "forward"],
)
def test_a_model_that_is_not_whole_ends_the_trip(plugin, trip, monkeypatch, fault, words):
    monkeypatch.setattr(plugin, "materialize_meta_tensors", after(plugin.materialize_meta_tensors, fault))
    with pytest.raises(plugin.RoundTripError, match=words):
        trip(Tiny().eval())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda m: setattr(m.linear1, "weight", nn.Parameter(m.linear1.weight.clone())), "linear1.weight came back as"),
        (lambda m: m.__dict__.pop("to"), r"\['to'\] of '' did not come back"),
        (lambda m: setattr(m, "note", 1), r"\['note'\] of '' did not"),
    ],
    ids=["placeholder", "mover", "attribute"],
)
def test_a_dispatch_that_did_not_come_back_ends_the_trip(plugin, trip, monkeypatch, fault, words):
    monkeypatch.setattr(plugin, "restore_dispatch", after(plugin.restore_dispatch, fault))
    with pytest.raises(plugin.RoundTripError, match=words):
        trip(Tiny().eval())


def test_a_lost_tie_ends_the_trip(plugin, trip, monkeypatch):
    def untie(model):
        model.head.weight = nn.Parameter(model.head.weight.clone())

    monkeypatch.setattr(plugin, "materialize_meta_tensors", after(plugin.materialize_meta_tensors, untie))
    with pytest.raises(plugin.RoundTripError, match=r"ties were \[\['embed.weight', 'head.weight'\]\], and are \[\]"):
        trip(Tied().eval())
