"""A look at what modules hold sees every exchange, addition and removal, and nothing else."""

import collections

import pytest
import torch

from modelcache.dataplane.structure import Structure


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.head = torch.nn.Linear(2, 1)
        self.register_buffer("none", None)


def exchange_tables(net: Net) -> None:
    vars(net.head)["_parameters"] = collections.OrderedDict(net.head._parameters)


CHANGES = {
    "a parameter exchanged": lambda net: setattr(net.head, "weight", torch.nn.Parameter(net.head.weight.detach())),
    "a parameter added": lambda net: net.body.register_parameter("extra", torch.nn.Parameter(torch.ones(1))),
    "a parameter removed": lambda net: delattr(net.head, "bias"),
    "a buffer put where none was": lambda net: setattr(net, "none", torch.ones(1)),
    "a buffer added": lambda net: net.body[0].register_buffer("extra", torch.ones(1)),
    "a module exchanged": lambda net: setattr(net, "head", torch.nn.Linear(2, 1)),
    "a module added deep inside": lambda net: net.body[0].add_module("adapter", torch.nn.Linear(2, 2)),
    "a module removed": lambda net: net.body.pop(1),
    "a table exchanged for an equal one": exchange_tables,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    net = Net()
    structure = Structure.of([net])
    assert structure.is_same()
    CHANGES[change](net)
    assert not structure.is_same()


def test_data_and_modes_are_no_part_of_it():
    net = Net()
    structure = Structure.of([net])
    net.body[1](torch.rand(4, 2))
    net.eval().requires_grad_(False)
    net.head.weight.data = torch.ones(3)
    assert structure.is_same()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_modules_with_tables_of_another_kind_are_not_answered_for():
    assert Structure.of([torch.jit.script(torch.nn.Linear(2, 2))]) is None
