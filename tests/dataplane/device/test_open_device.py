"""Choosing a device by name, and the device that is none."""

import subprocess
import sys

import pytest
import torch

from modelcache.dataplane.device import open_device


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "simulated:1", "cpu", "host"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="auto, cuda, cuda:N, simulated, host_only"):
        open_device(name)


def test_an_unknown_memory_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown memory 'virtual'; choose one of allocated, mapped"):
        open_device("host_only", memory="virtual")


@pytest.mark.parametrize("memory", ["allocated", "mapped"])
def test_memory_is_chosen_where_there_is_any(memory):
    device = open_device("simulated", memory=memory)
    assert device.keeps_addresses == (memory == "mapped")
    device.close()
    assert not open_device("host_only", memory=memory).keeps_addresses


def test_an_option_of_another_device_is_refused():
    with pytest.raises(TypeError, match="no arguments"):
        open_device("host_only", capacity_bytes=1)


def test_a_cuda_device_that_is_not_there_is_refused_in_words():
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        open_device("cuda:99")


def test_auto_takes_a_gpu_where_there_is_one():
    device = open_device("auto")
    assert device.name == ("cuda:0" if torch.cuda.is_available() else "cpu")
    device.close()


def test_simulated_takes_its_options():
    device = open_device("simulated", capacity_bytes=12345, link_bytes_per_s=None)
    assert (device.name, device.total_bytes()) == ("sim:0", 12345)
    device.close()


def test_without_an_accelerator_device_memory_is_refused_and_ram_still_works():
    device, block = open_device("host_only"), torch.zeros(8, dtype=torch.uint8)
    assert (device.name, device.torch_device, device.holds_copies) == ("cpu", torch.device("cpu"), False)
    for call in (
        lambda: device.allocate(1),
        lambda: device.copy_in(block, block),
        lambda: device.copy_out(block, block),
        lambda: device.let_compute_wait(None),
        lambda: device.charge_bytes(1),
        lambda: device.reserve(1),
        lambda: device.map(block),
        lambda: device.unmap(block),
    ):
        with pytest.raises(RuntimeError, match="host_only"):
            call()
    assert (device.total_bytes(), device.free_bytes(), device.allocated_bytes()) == (0, 0, 0)
    assert not device.page_lock(block)
    device.page_unlock(block)
    device.settle()
    device.release_cached()
    assert device.storage(block, 4, 4).data_ptr() == block.data_ptr() + 4
    device.close()


def run_python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_another_backend_in_torchs_spare_key_is_named():
    done = run_python(
        "import torch; torch.utils.rename_privateuse1_backend('npu')\n"
        "from modelcache.dataplane.device import open_device\n"
        "try: open_device('simulated')\n"
        "except RuntimeError as error: print(error)"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "'npu' holds it" in done.stdout


KEPT = """
import torch
from modelcache.dataplane.device import open_device
from modelcache.dataplane.device.faults import Faults
faults = Faults()
device = open_device("simulated", faults=faults)
ram = torch.zeros(100, dtype=torch.uint8)
kept = [device.allocate(100), torch.ones(3).to("sim:0"), torch.nn.Linear(2, 2).to("sim:0")]
kept += [device.storage(kept[0], 1, 2), device.storage(ram, 1, 2)]
"""


@pytest.mark.parametrize(
    "last",
    [
        "event = device.copy_in(kept[0], ram)",
        "hold = faults.hold('copy_in'); event = device.copy_in(kept[0], ram); assert hold.wait_reached(5)",
        "events = [device.copy_in(kept[0], ram) for _ in range(200)] + [device.copy_out(ram, kept[0])]",
        "event = device.copy_in(kept[0], ram); event.wait(); device.close()",
    ],
    ids=["enqueued", "held", "many", "closed"],
)
def test_opening_and_leaving_with_tensors_and_copies_alive_is_quiet(last):
    done = run_python(KEPT + last)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
