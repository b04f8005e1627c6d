import subprocess
import sys
from types import SimpleNamespace

import pynvml

from modelcache.dataplane.probe import Reading, Unavailable, cuda_figures, machine_report, totals

GIB = 1024**3


class OneCard:
    """NVML of a machine with one card and one user."""

    NVMLError = pynvml.NVMLError

    def __init__(self):
        self.num_open = 0
        self.is_broken = False
        self.is_integrated = False
        self.generation = 4

    def nvmlInit(self):
        if self.is_broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        self.num_open += 1

    def nvmlShutdown(self):
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self):
        return b"580.126.09"

    def nvmlSystemGetCudaDriverVersion(self):
        return 13020

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return "card"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return "card"

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA L4"

    def nvmlDeviceGetUUID(self, handle):
        return b"GPU-l4"

    def nvmlDeviceGetMigMode(self, handle):
        return (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=24 * GIB, free=23 * GIB)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return self.generation

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        if self.is_integrated:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 8

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=99, usedGpuMemory=GIB)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return []


def test_totals_give_the_reason_where_there_is_no_figure(tmp_path):
    nvml = OneCard()
    nvml.is_broken = True
    found = totals(0, nvml=nvml, root=tmp_path)
    assert isinstance(found.vram, Unavailable)
    assert found.vram.code == "DRIVER_NOT_LOADED"
    assert found.ram.total_bytes > 0


def test_totals_measure_the_device_and_the_machine_and_close_what_they_opened(tmp_path):
    nvml = OneCard()
    found = totals(0, nvml=nvml, root=tmp_path)
    assert isinstance(found.vram, Reading)
    assert (found.vram.total_bytes, found.vram.others_bytes) == (24 * GIB, GIB)
    assert nvml.num_open == 0


def test_totals_without_a_cuda_device_ask_nobody_about_one(tmp_path):
    nvml = OneCard()
    nvml.is_broken = True
    assert totals(None, nvml=nvml, root=tmp_path).vram is None


def test_the_report_lists_versions_cards_and_users(tmp_path):
    nvml = OneCard()
    report = machine_report(nvml=nvml, root=tmp_path)
    assert (report.nvml, report.driver_version, report.cuda_version) == (None, "580.126.09", "13.2")
    [device] = report.devices
    assert device.uuids == ("GPU-l4",)
    assert (device.name, device.uuid, device.memory.total_bytes) == ("NVIDIA L4", "GPU-l4", 24 * GIB)
    assert [(user.pid, user.used_bytes) for user in device.users] == [(99, GIB)]
    assert nvml.num_open == 0


def test_the_link_is_named_and_rated_by_its_generation_and_lanes(tmp_path):
    nvml = OneCard()
    link = machine_report(nvml=nvml, root=tmp_path).devices[0].link
    assert (str(link), link.bytes_per_s) == ("PCIe 4.0 x8", 12_800_000_000)
    nvml.generation = 9
    assert machine_report(nvml=nvml, root=tmp_path).devices[0].link is None
    nvml.is_integrated = True
    assert machine_report(nvml=nvml, root=tmp_path).devices[0].link is None


def test_the_report_of_a_machine_without_nvml_says_why(tmp_path):
    nvml = OneCard()
    nvml.is_broken = True
    report = machine_report(nvml=nvml, root=tmp_path)
    assert report.nvml.code == "DRIVER_NOT_LOADED"
    assert report.devices == ()


def test_a_cuda_device_that_is_not_there_has_no_figures():
    assert cuda_figures(999) is None


def test_probing_imports_no_torch():
    code = (
        "import sys\n"
        "from modelcache.dataplane.probe import machine_report, totals\n"
        "totals(0), machine_report()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
