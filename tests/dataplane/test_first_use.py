"""Which tensors operators were seen to read in a call, and which were not."""

import threading

import pytest
import torch

from modelcache.dataplane.first_use import FirstUse, Recorder, can_be_recorded, has_compiled


class Net(torch.nn.Module):
    """A tensor of its own, a tied head, one whose weight is read from outside, and one that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.embed = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.unused = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        x = self.embed(x) * self.scale
        x = self.layers[0](x)
        x = torch.nn.functional.linear(x, self.layers[1].weight)
        return self.head(x)


def recorded(net: torch.nn.Module, *args: torch.Tensor) -> FirstUse:
    with Recorder([net]) as recorder:
        net(*args)
    return recorder.found()


def test_what_operators_read_or_write_is_seen_whichever_way_they_came_to_it():
    net = Net()
    use = recorded(net, torch.tensor([1, 2]))
    for tensor in (net.scale, net.embed.weight, *net.layers[0].parameters(), net.layers[1].weight, net.steps):
        assert id(tensor) in use.seen


def test_what_nobody_read_is_known_and_not_seen():
    net = Net()
    use = recorded(net, torch.tensor([1]))
    for tensor in (*net.unused.parameters(), net.layers[1].bias):
        assert id(tensor) in use.tensors
        assert id(tensor) not in use.seen


def test_a_view_counts_as_the_tensor_and_lists_are_looked_into():
    net = torch.nn.ParameterList(torch.ones(4) for _ in range(3))
    rows = net[0].detach()[1:]
    with Recorder([net]) as recorder:
        rows.sum()
        torch.cat([net[1], torch.ones(2)])
    assert recorder.found().seen == {id(net[0]), id(net[1])}


def test_other_threads_are_not_looked_at():
    net = Net()
    with Recorder([net]) as recorder:
        thread = threading.Thread(target=lambda: net.unused(torch.ones(1, 4)))
        thread.start()
        thread.join()
    assert recorder.found().seen == frozenset()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_ends_a_call_nothing_is_left_behind(error):
    net = Net()
    net.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        recorded(net, torch.tensor([1]))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_scripts_and_tensor_subclasses_cannot_be_recorded():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert can_be_recorded(net)
    assert not can_be_recorded(torch.jit.trace(net, torch.ones(1, 2)))
    net.register_buffer("odd", torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {})))
    assert not can_be_recorded(net)


def test_it_is_known_whether_the_compiler_made_code():
    torch._dynamo.reset()
    assert not has_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert has_compiled()
    torch._dynamo.reset()
    assert not has_compiled()
