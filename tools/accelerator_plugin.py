"""A pytest plugin that lets accelerate's tests for one or two accelerators run without one.

``-p accelerator_plugin --accelerator fake`` un-skips ``require_non_cpu``: the device 0 is then
``torch.device("cpu")``, which accelerate does not take for the CPU, because it asks for the string ``"cpu"``.
``--accelerator simulated`` gives the tests two simulated devices with memory of their own, and un-skips what needs more
than one device or a GPU whose memory can be measured, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from accelerate import test_utils
from accelerate.state import PartialState
from accelerate.test_utils import testing
from wrapping import replace_everywhere, wrap_everywhere

_STACK = pytest.StashKey[ExitStack]()
_CAPACITY_BYTES = 1 << 30
_TAKE_DEVICES = {
    "accelerate.big_modeling": (
        "cpu_offload",
        "cpu_offload_with_hook",
        "disk_offload",
        "dispatch_model",
        "load_checkpoint_and_dispatch",
    ),
    "accelerate.utils.modeling": ("load_checkpoint_in_model", "set_module_tensor_to_device"),
}
_DEVICE_ARGUMENTS = ("device", "device_map", "execution_device", "main_device")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerator", choices=("fake", "simulated"), help="what stands for the accelerator")


@pytest.hookimpl(tryfirst=True)  # before other plugins wrap the same functions or open devices
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STACK] = stack = ExitStack()
    match config.getoption("--accelerator"):
        case "fake":
            _fake()
        case "simulated":
            _simulate(stack)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_STACK].close()


def _fake() -> None:
    replace_everywhere(testing.require_non_cpu, lambda test: test)
    for module, names in _TAKE_DEVICES.items():
        wrap_everywhere(module, names, _with_device_0_on_the_cpu)


def _with_device_0_on_the_cpu(function: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    for name in _DEVICE_ARGUMENTS:
        given = call.arguments.get(name)
        if isinstance(given, dict):
            call.arguments[name] = {key: _mapped(device) for key, device in given.items()}
        elif name in call.arguments:
            call.arguments[name] = _mapped(given)
    return function(*call.args, **call.kwargs)


def _mapped(device: Any) -> Any:
    return torch.device("cpu") if type(device) is int and device == 0 else device


def _simulate(stack: ExitStack) -> None:
    from modelcache.dataplane.device.simulated import SimulatedDevice

    devices = [stack.enter_context(closing(SimulatedDevice(_CAPACITY_BYTES, link_bytes_per_s=None))) for _ in range(2)]
    # The decorators ask these when a test module is imported. torch itself resolves the numbers 0 and 1.
    for module in (testing, test_utils):
        vars(module).update(torch_device="sim", device_count=len(devices))
    for name in ("require_cuda_or_xpu", "require_multi_gpu_or_xpu", "require_cuda", "require_multi_gpu"):
        if hasattr(testing, name):
            replace_everywhere(getattr(testing, name), lambda test: test)
    PartialState.default_device = property(lambda _: devices[0].torch_device)
