"""A compiled model that is given up and comes back a hundred times is not compiled again."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from modelcache import ModelCache
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier

CYCLES = 100


class Net(torch.nn.Module):
    """A tied head, a buffer, and enough layers for several segments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
        self.head = torch.nn.Linear(32, 32, bias=False)
        self.head.weight = self.layers[0].weight
        self.register_buffer("shift", torch.randn(32))

    def forward(self, x):
        return self.head(torch.tanh(self.layers(x)) + self.shift)


@pytest.fixture(autouse=True)
def no_compiled_code_is_left():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()
    counters.clear()


def num_compiled() -> int:
    """How many graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def travels(cache: ModelCache, model_of, tier: Tier) -> None:
    """Compile once, then a hundred round trips with the same answer and no new graph."""
    x = torch.linspace(-1, 1, 64).reshape(2, 32)
    with torch.no_grad(), cache.get("m") as model:
        x = x.to(model.shift.device)
        compiled = model_of(model)
        expected = compiled(x).cpu()
        torch.testing.assert_close(expected, Net()(x.cpu()), rtol=1e-5, atol=1e-5)
    graphs = num_compiled()
    assert graphs == 1
    for _ in range(CYCLES):
        cache.evict("m", to=tier)
        with torch.no_grad(), cache.get("m"):
            assert torch.equal(compiled(x).cpu(), expected)
    assert num_compiled() == graphs
    assert not counters["recompile_reasons"]
    up = [event for event in cache.events() if event.target is (Tier.VRAM if tier is Tier.RAM else Tier.RAM)]
    assert len(up) >= CYCLES


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_on_a_device_is_compiled_once(tmp_path, backend, tier):
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    options = {"vram": 1 << 19, "ram": 1 << 20, "disk": 1 << 20, "segment": 8192, "image_dir": tmp_path}
    with ModelCache(device=device, progress=False, **options) as cache:
        cache.register("m", Net)
        travels(cache, lambda model: torch.compile(model, backend=backend), tier)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reload", [False, True])
def test_a_model_in_ram_is_compiled_once(tmp_path, backend, reload):
    options = {"ram": 1 << 20, "disk": 1 << 20, "segment": 8192, "image_dir": tmp_path}
    with ModelCache(device="host_only", progress=False, **options) as cache:
        cache.register("m", Net, reload=reload)
        travels(cache, lambda model: torch.compile(model, backend=backend), Tier.DISK)


@pytest.mark.timeout(120)  # the C++ compiler alone takes 5 to 25 s, once for each user of a machine
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself, when it is first imported
def test_a_model_in_ram_that_inductor_compiled_is_compiled_once(tmp_path):
    options = {"ram": 1 << 20, "disk": 1 << 20, "segment": 8192, "image_dir": tmp_path}
    with ModelCache(device="host_only", progress=False, **options) as cache:
        cache.register("m", Net)
        travels(cache, lambda model: torch.compile(model, backend="inductor"), Tier.DISK)


def test_a_loader_s_compiled_model_is_compiled_once(tmp_path):
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    options = {"vram": 1 << 19, "ram": 1 << 20, "disk": 1 << 20, "segment": 8192, "image_dir": tmp_path}
    with ModelCache(device=device, progress=False, **options) as cache:
        cache.register("m", lambda: torch.compile(Net(), backend="aot_eager"))
        travels(cache, lambda model: model, Tier.RAM)
