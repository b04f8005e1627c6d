"""Small models for accelerate to dispatch, and what must hold before and after they are made whole."""

from collections.abc import Callable

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import nn

from modelcache.dataplane.materialize.entry_points import is_dispatched, materialize_meta_tensors

# `dispatch_model` asks for the string "cpu": a device object is another main device to it, so that "cpu" entries are
# taken away as they are with a GPU.
ACCELERATOR = torch.device("cpu")
SPLIT = {"linear1": "cpu", "batchnorm": "cpu", "linear2": "disk"}
# With all of a model on disk, accelerate 1.14 and older want to be told; newer ones do the same without.
DISK_ONLY = {"main_device": "cpu", "force_hooks": True}
NO_DATA = "Cannot copy out of meta tensor"
REFUSES = "You can't move a model that has some modules offloaded to cpu or disk."

INSTALLED = Version(accelerate.__version__)


def built_by_accelerate(since: str, otherwise: str) -> pytest.MarkDecorator:
    """For what an older accelerate cannot build at all, so that there is nothing for us to make whole."""
    return pytest.mark.skipif(
        Version(since) > INSTALLED, reason=f"accelerate {INSTALLED} {otherwise}; from {since} on it can be built"
    )


can_offload_torchao = built_by_accelerate("1.14", "cannot offload torchao's tensors")

OFFLOADED_TIES = ("1.6", "fails in the forward of offloaded tied weights on the CPU")
runs_offloaded_ties = built_by_accelerate(*OFFLOADED_TIES)


def skip_if_offloaded_ties_cannot_run() -> None:
    """End a test before a forward that an older accelerate does not survive."""
    if Version(OFFLOADED_TIES[0]) > INSTALLED:
        pytest.skip(runs_offloaded_ties.kwargs["reason"])


X = torch.linspace(-1, 1, 24).reshape(8, 3)
IDS = torch.tensor([[1, 2, 3]])


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear1, self.batchnorm, self.linear2 = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear2(self.batchnorm(self.linear1(x)))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.mid, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


class Root(nn.Module):
    """A parameter of the root's own beside a child."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.scale, self.lin = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.lin(x * self.scale)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.blk, self.out = Root(), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.blk(x))


class Holder(nn.Module):
    """Uses the weights of its child without calling it."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.dense.weight, self.dense.bias)


class OwnParameter(nn.Parameter):
    """A parameter class of somebody else."""


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clones of the state dict, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def meta_names(model: nn.Module) -> list[str]:
    return [name for name, tensor in tensors(model).items() if tensor.is_meta]


def portrait(model: nn.Module) -> object:
    """Every object that hangs on the model, by identity: two equal portraits mean that nothing was changed."""
    return {
        path: (
            {key: id(value) for key, value in vars(module).items()},
            {key: (id(t), t is not None and t.data_ptr()) for key, t in module._parameters.items()},
            {key: (id(t), t is not None and t.data_ptr()) for key, t in module._buffers.items()},
        )
        for path, module in model.named_modules(remove_duplicate=False)
    }


def leftovers(model: nn.Module) -> dict[str, set[str]]:
    """What accelerate put on modules and was not taken off."""
    names = {"_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"}
    found = {path: names & set(vars(module)) for path, module in model.named_modules()}
    return {path: left for path, left in found.items() if left}


def assert_whole(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert meta_names(model) == []
    assert leftovers(model) == {}
    assert not is_dispatched(model)
    assert_same(model.state_dict(), expected)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def assert_stuck(model: nn.Module) -> None:
    """The dispatched model cannot be moved, in accelerate's own words."""
    assert is_dispatched(model)
    with pytest.raises(NotImplementedError, match=NO_DATA):
        model.cpu()


def assert_moves(model: nn.Module) -> None:
    model.cpu()
    model.to("cpu")
    model.to(torch.float64)
    assert {t.dtype for t in tensors(model).values() if t.is_floating_point()} == {torch.float64}


def check_round(model: nn.Module, dispatch: Callable[[nn.Module], object], *inputs: torch.Tensor) -> nn.Module:
    """Dispatch a model, see it stuck, make it whole, and see it as it was."""
    expected = state(model)
    with torch.no_grad():
        output = model(*inputs) if inputs else None
    dispatch(model)
    assert_stuck(model)
    assert materialize_meta_tensors(model) is model
    assert_whole(model, expected)
    if output is not None:
        with torch.no_grad():
            assert torch.allclose(model(*inputs), output, atol=1e-6)
    assert_moves(model)
    return model
