import subprocess
import sys

from nvml_fakes import GIB, Card, FakeNvml, sliced_card

from modelcache.dataplane.probe.machine import Reading, Unavailable, cuda_figures, machine_report, totals


def one_card(**more):
    card = Card("NVIDIA L4", "GPU-l4", 24 * GIB, 23 * GIB, **more)
    card.users = [(99, GIB)]
    return FakeNvml(card)


def no_driver():
    nvml = FakeNvml()
    nvml.init_error = "DRIVER_NOT_LOADED"
    return nvml


def test_totals_give_the_reason_where_there_is_no_figure(tmp_path):
    nvml = no_driver()
    found = totals(0, nvml=nvml, root=tmp_path)
    assert isinstance(found.vram, Unavailable)
    assert found.vram.code == "DRIVER_NOT_LOADED"
    assert found.ram.total_bytes > 0


def test_totals_measure_the_device_and_the_machine_and_close_what_they_opened(tmp_path):
    nvml = one_card()
    found = totals(0, nvml=nvml, root=tmp_path)
    assert isinstance(found.vram, Reading)
    assert (found.vram.total_bytes, found.vram.others_bytes) == (24 * GIB, GIB)
    assert nvml.num_open == 0


def test_totals_without_a_cuda_device_ask_nobody_about_one(tmp_path):
    nvml = no_driver()
    assert totals(None, nvml=nvml, root=tmp_path).vram is None


def test_the_report_lists_versions_cards_and_users(tmp_path):
    nvml = one_card()
    report = machine_report(nvml=nvml, root=tmp_path)
    assert (report.nvml, report.driver_version, report.cuda_version) == (None, "580.126.09", "13.2")
    [device] = report.devices
    assert device.uuids == ("GPU-l4",)
    assert (device.name, device.uuid, device.memory.total_bytes) == ("NVIDIA L4", "GPU-l4", 24 * GIB)
    assert [(user.pid, user.used_bytes) for user in device.users] == [(99, GIB)]
    assert nvml.num_open == 0


def test_the_link_is_named_and_rated_by_its_generation_and_lanes(tmp_path):
    nvml = one_card()
    nvml.cards[0].link = (4, 8)
    link = machine_report(nvml=nvml, root=tmp_path).devices[0].link
    assert (str(link), link.bytes_per_s) == ("PCIe 4.0 x8", 12_800_000_000)
    nvml.cards[0].link = (9, 16)
    assert machine_report(nvml=nvml, root=tmp_path).devices[0].link is None
    nvml.cards[0].link = None
    assert machine_report(nvml=nvml, root=tmp_path).devices[0].link is None


def test_the_report_of_a_cut_card_shows_the_slice_and_all_uuids(tmp_path):
    [device] = machine_report(nvml=FakeNvml(sliced_card()), root=tmp_path).devices
    assert device.memory.total_bytes == 9 * GIB
    assert device.uuids == ("GPU-parent", "MIG-s1", "MIG-s2")


def test_the_older_bindings_answer_in_bytes(tmp_path):
    nvml = one_card()
    nvml.nvmlSystemGetDriverVersion = lambda: b"470.1"
    nvml.cards[0].name, nvml.nvmlDeviceGetUUID = b"NVIDIA L4", lambda handle: b"GPU-l4"
    report = machine_report(nvml=nvml, root=tmp_path)
    assert report.driver_version == "470.1"
    assert (report.devices[0].name, report.devices[0].uuid) == ("NVIDIA L4", "GPU-l4")


def test_the_report_of_a_machine_without_nvml_says_why(tmp_path):
    nvml = no_driver()
    report = machine_report(nvml=nvml, root=tmp_path)
    assert report.nvml.code == "DRIVER_NOT_LOADED"
    assert report.devices == ()


def test_a_cuda_device_that_is_not_there_has_no_figures():
    assert cuda_figures(999) is None


def test_probing_imports_no_torch():
    code = (
        "import sys\n"
        "from modelcache.dataplane.probe.machine import machine_report, totals\n"
        "totals(0), machine_report()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
