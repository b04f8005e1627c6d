"""Which weights were one tensor before the dispatch, and which only look like it."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dispatched import ACCELERATOR, DISK_ONLY, IDS, Tied, X, assert_whole, skip_if_offloaded_ties_cannot_run, state
from torch import nn

from modelcache.dataplane.materialize.entry_points import materialize_meta_tensors
from modelcache.errors import MaterializeError


@pytest.mark.parametrize("forwards", [0, 2])
@pytest.mark.parametrize("main_device", ["cpu", ACCELERATOR], ids=["main cpu", "main accelerator"])
@pytest.mark.parametrize(
    "places",
    [("cpu", "disk"), ("disk", "cpu"), ("disk", "disk"), ("cpu", "cpu")],
    ids="embed {0[0]} head {0[1]}".format,
)
def test_a_tie_is_one_tensor_again_wherever_its_halves_went(tmp_path, places, main_device, forwards):
    model = Tied().eval()
    expected, output = state(model), model(IDS)
    embed, head = places
    places = {"embed": embed, "mid": "disk", "head": head}
    dispatch_model(model, places, main_device=main_device, offload_dir=tmp_path, force_hooks=True)
    if forwards and main_device == "cpu" and embed != head:
        skip_if_offloaded_ties_cannot_run()
    for _ in range(forwards):
        model(IDS)
    materialize_meta_tensors(model)
    assert model.embed.weight is model.head.weight
    assert_whole(model, expected)
    assert torch.allclose(model(IDS), output, atol=1e-6)


def test_ties_survive_cpu_offload():
    model = Tied().eval()
    cpu_offload(model, ACCELERATOR)
    model(IDS)
    materialize_meta_tensors(model, copy="always")
    assert model.embed.weight is model.head.weight


def test_equal_weights_that_were_never_tied_stay_two(tmp_path):
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    disk_offload(model, tmp_path, ACCELERATOR)
    materialize_meta_tensors(model)
    assert model[0].weight is not model[1].weight
    assert model[0].weight.data_ptr() != model[1].weight.data_ptr()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert model[1].weight.tolist() == [1, 1, 1]


def test_equal_norms_beside_a_real_tie_are_not_drawn_into_it(tmp_path):
    class Model(Tied):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])

    model = Model().eval()
    places = {"embed": "disk", "mid": "disk", "head": "disk", "norms": "disk"}
    dispatch_model(model, places, offload_dir=tmp_path, **DISK_ONLY)
    model(IDS)
    materialize_meta_tensors(model)
    assert model.embed.weight is model.head.weight
    assert model.norms[0].weight is not model.norms[1].weight


def test_a_tie_that_nobody_recorded_can_be_named(tmp_path):
    model = Tied().eval()
    disk_offload(model, tmp_path, ACCELERATOR)  # accelerate records nothing here
    model(IDS)
    materialize_meta_tensors(model, tied_params=[["embed.weight", "head.weight"]])
    assert model.embed.weight is model.head.weight


def test_a_tie_can_be_named_as_a_mapping(tmp_path):
    model = Tied().eval()
    disk_offload(model, tmp_path, ACCELERATOR)
    materialize_meta_tensors(model, tied_params={"head.weight": "embed.weight"})
    assert model.embed.weight is model.head.weight


def test_naming_a_tie_of_different_tensors_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    output = model(X)
    disk_offload(model, tmp_path, ACCELERATOR)
    with pytest.raises(MaterializeError, match="data differs") as caught:
        materialize_meta_tensors(model, tied_params=[["0.weight", "1.weight"]])
    assert caught.value.names == ("0.weight", "1.weight")
    assert torch.allclose(model(X), output, atol=1e-6)


def test_a_listed_tie_whose_halves_differ_is_no_tie(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.all_tied_weights_keys = {"1.weight": "0.weight", "1.bias": "nowhere.bias"}
    expected = state(model)
    disk_offload(model, tmp_path, ACCELERATOR)
    assert_whole(materialize_meta_tensors(model), expected)
    assert model[0].weight is not model[1].weight


def test_a_listed_tie_of_a_submodel_is_found_under_its_own_names(tmp_path):
    model = nn.ModuleDict({"lm": Tied().eval()})
    model["lm"].all_tied_weights_keys = {"head.weight": "embed.weight"}
    disk_offload(model, tmp_path, ACCELERATOR)
    model["lm"](IDS)
    materialize_meta_tensors(model)
    assert model["lm"].embed.weight is model["lm"].head.weight


def test_a_tie_holding_nan_is_still_a_tie(tmp_path):
    model = Tied().eval()
    with torch.no_grad():
        model.embed.weight[0, 0] = float("nan")
    dispatch_model(model, {"embed": "disk", "mid": "disk", "head": "disk"}, offload_dir=tmp_path, **DISK_ONLY)
    model(IDS)
    materialize_meta_tensors(model)
    assert model.embed.weight is model.head.weight


def test_the_confused_tie_record_of_an_older_accelerate_ties_nothing(tmp_path):
    """Accelerate 1.14 and older took the address 0 of every meta tensor for one tie, and mixed the weights up."""
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3), nn.Linear(3, 3))
    expected = state(model)
    dispatch_model(model, {"0": "disk", "1": "disk", "2": "disk"}, offload_dir=tmp_path, **DISK_ONLY)
    mixed_up = nn.Parameter(torch.full((3,), 9.0))
    for module in model:
        module._hf_hook.tied_params_map[0] = {ACCELERATOR: mixed_up}
        module._hf_hook.tied_params_names = {"weight", "bias"}
        module._parameters["bias"] = mixed_up
    with pytest.warns(UserWarning, match=r"1\.14 and older mix up 6 weights .* such as 0\.weight, ") as caught:
        materialize_meta_tensors(model)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert_whole(model, expected)
    assert len({id(parameter) for parameter in model.parameters()}) == 6
