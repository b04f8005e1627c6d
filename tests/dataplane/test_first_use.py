"""Which blocks read which tensors: what one forward showed, and what it cannot answer for."""

import threading

import pytest
import torch

from modelcache.dataplane.first_use import FirstUse, Recorder, blocks_of, can_be_recorded


class Net(torch.nn.Module):
    """Blocks in a list, a tensor of its own, a tied head, and a block whose weight its neighbour reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.embed = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(2))
        self.peeked = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        x = self.peeked(x) + self.peeked.bias
        return self.head(x)


def recorded(net: torch.nn.Module, *args: torch.Tensor) -> FirstUse | None:
    found = []
    hook = net.register_forward_pre_hook(lambda module, _args: Recorder(module, found.append) and None)
    net(*args)
    hook.remove()
    (use,) = found
    return use


def readers_of(use: FirstUse, tensor: torch.Tensor) -> tuple:
    return use.readers.get(id(tensor), ())


def test_blocks_are_the_items_of_lists_and_the_largest_modules_beside_them():
    net = torch.nn.Module()
    net.embed = torch.nn.Embedding(2, 2)
    net.body = torch.nn.Module()
    net.body.norm = torch.nn.LayerNorm(2)
    net.body.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2)])
    assert list(blocks_of(net)) == [net.embed, net.body.norm, net.body.layers[0][0], net.body.layers[1]]


def test_a_tensor_that_only_its_block_reads_is_the_block_s():
    net = Net()
    use = recorded(net, torch.tensor([1, 2]))
    assert readers_of(use, net.layers[0][0].weight) == (net.layers[0][0],)
    assert readers_of(use, net.peeked.weight) == (net.peeked,)


def test_a_tied_tensor_is_read_by_both_of_its_blocks_in_order():
    net = Net()
    assert readers_of(recorded(net, torch.tensor([1])), net.head.weight) == (net.embed, net.head)


def test_nobody_answers_for_what_is_read_outside_of_its_block_or_by_no_block_or_not_at_all():
    net = Net()
    use = recorded(net, torch.tensor([1]))
    for tensor in (net.scale, net.peeked.bias, net.unused.weight, net.unused.bias):
        assert id(tensor) in use.tensors
        assert id(tensor) not in use.readers


def test_a_view_of_a_tensor_counts_as_the_tensor():
    class Sliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)
            self.rows = self.inner.weight.detach()[1:]

        def forward(self, x):
            return self.inner(x)[..., :3] + self.rows.sum()

    net = Sliced()
    assert id(net.inner.weight) not in recorded(net, torch.ones(1, 4)).readers


def test_a_forward_that_fails_shows_nothing_and_leaves_nothing_behind():
    net = Net()
    found = []
    hook = net.register_forward_pre_hook(lambda module, _args: Recorder(module, found.append) and None)
    with pytest.raises(IndexError):
        net(torch.tensor([99]))
    hook.remove()
    assert found == [None]
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in net.modules())


def test_another_thread_inside_the_same_module_meanwhile_changes_nothing():
    net = Net()
    inside, done = threading.Event(), threading.Event()
    net.layers[0].register_forward_hook(lambda *_: inside.set() or done.wait(10) and None)
    found = []
    main = threading.get_ident()

    def record(module: torch.nn.Module, _args: object) -> None:
        if threading.get_ident() == main:
            Recorder(module, found.append)

    net.register_forward_pre_hook(record)

    def other() -> None:
        inside.wait(10)
        net.unused(torch.ones(1, 4))
        net.peeked(torch.ones(1, 4))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    net(torch.tensor([1]))
    thread.join()
    (use,) = found
    assert id(net.unused.weight) not in use.readers
    assert readers_of(use, net.peeked.weight) == (net.peeked,)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["compiled", "own forward", "script", "subclass"])
def test_what_does_not_run_through_its_hooks_or_cannot_be_seen_is_not_recorded(kind):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert can_be_recorded(net)
    if kind == "compiled":
        net[0].compile(backend="eager")
    elif kind == "own forward":
        net.forward = lambda x: x
    elif kind == "script":
        net = torch.jit.trace(net, torch.ones(1, 2))
    else:
        tensor = torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {}))
        net.register_buffer("odd", tensor)
    assert not can_be_recorded(net)
