"""A plan as people see it."""

import pytest
from accelerate import disk_offload, dispatch_model, init_empty_weights
from dispatched import ACCELERATOR, Tied, Tiny
from torch import nn

from modelcache import MaterializePlan, PlannedTensor, plan_materialize

PLACES = {"embed": "cpu", "mid": "disk", "head": "cpu"}


@pytest.fixture
def model(tmp_path):
    return dispatch_model(Tied().eval(), PLACES, main_device=ACCELERATOR, offload_dir=tmp_path)


def test_a_plan_is_a_table_with_a_sum(model, tmp_path):
    assert str(plan_materialize(model)).splitlines() == [
        "264 B  embed.weight = head.weight  memory of the dispatch on cpu",
        f"144 B  mid.weight                  file {tmp_path}/mid.weight.dat",
        f" 24 B  mid.bias                    file {tmp_path}/mid.bias.dat",
        "3 tensors to make real, 432 B; 168 B of new memory needed on cpu",
    ]


def test_a_plan_is_data(model):
    plan = plan_materialize(model)
    assert isinstance(plan, MaterializePlan)
    assert [(one.names, one.size_bytes) for one in plan.tensors] == [
        (("embed.weight", "head.weight"), 264),
        (("mid.weight",), 144),
        (("mid.bias",), 24),
    ]
    assert (plan.total_bytes, plan.needed_bytes, plan.moved_bytes, plan.target_device) == (432, 168, 0, "cpu")
    assert plan.missing == plan.problems == ()
    assert plan_materialize(model, copy="always").needed_bytes == 432


def test_a_tie_that_is_yet_to_be_checked_is_shown(tmp_path):
    places = {"embed": "disk", "mid": "cpu", "head": "disk"}
    model = dispatch_model(Tied().eval(), places, offload_dir=tmp_path)
    assert str(plan_materialize(model)).splitlines()[2:] == [
        " tied  embed.weight = head.weight  if their data is the same",
        "2 tensors to make real, 528 B; 528 B of new memory needed on cpu",
    ]


def test_what_has_no_data_and_what_cannot_be_used_is_shown(tmp_path):
    model = nn.ModuleDict({"a": Tiny(), "b": disk_offload(nn.Linear(2, 2), tmp_path, ACCELERATOR)})
    with init_empty_weights():
        model["a"].linear1 = nn.Linear(3, 4)
    (tmp_path / "weight.dat").write_bytes(b"short")
    lines = str(plan_materialize(model)).splitlines()
    assert lines[:3] == [
        f"     8 B  b.bias            file {tmp_path}/bias.dat",
        " missing  a.linear1.weight  no data anywhere",
        " missing  a.linear1.bias    no data anywhere",
    ]
    assert lines[3].startswith("unusable  b.weight          ")
    assert lines[3].endswith("weight.dat has 5 bytes, its index says 16")
    assert lines[4:] == ["1 tensor to make real, 8 B; 3 cannot be made real; 8 B of new memory needed on cpu"]


def test_a_plan_of_thousands_prints_a_page_and_loses_nothing():
    tensors = tuple(PlannedTensor((f"layer.{i}",), 1024, "file x") for i in range(4000))
    plan = MaterializePlan(tensors, 0, tuple(f"lost.{i}" for i in range(70)), (), (), "cuda:0", 0)
    lines = str(plan).splitlines()
    assert len(lines) == 51 + 51 + 1
    assert lines[50].split() == ["3.9", "MiB", "3,950", "more", "tensors"]
    assert lines[101].split() == ["missing", "20", "more"]
    assert lines[102].startswith("4,000 tensors to make real, 3.9 MiB; 70 cannot be made real; 0 B of new memory")


def test_a_plan_with_nothing_to_do_says_so():
    assert str(plan_materialize(Tiny())) == "0 tensors to make real, 0 B; 0 B of new memory needed on cpu"
