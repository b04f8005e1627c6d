import pynvml
import pytest
from nvml_fakes import GIB, Card, FakeNvml, error, sliced_card

from modelcache.dataplane.probe.machine import AllocatorFigures, DriverFigures, Reading, Unavailable, VramProbe


class FakeHost:
    def read(self):
        return Reading(128 * GIB, 100 * GIB, 28 * GIB, 26 * GIB, "psutil", "psutil", at_s=0.0)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def read(nvml, index=0, *, allocator=None, driver=None, **options):
    return VramProbe(index, nvml=nvml, host=FakeHost(), **options).read(allocator=allocator, driver=driver)


# --- nobody answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words", "fix"),
    [
        ("LIBRARY_NOT_FOUND", "no NVIDIA driver library on this machine", "--gpus all"),
        ("DRIVER_NOT_LOADED", "the NVIDIA driver is not loaded", "load the NVIDIA driver"),
        ("LIB_RM_VERSION_MISMATCH", "driver/library version mismatch", "fix the driver (reboot after update)"),
        ("NO_PERMISSION", "no permission", "give the container the rights"),
        ("OPERATING_SYSTEM", "a control group took the device away", "restart the container"),
        ("UNKNOWN", "when the host reloads systemd", "restart the container"),
    ],
)
def test_nvml_that_does_not_start_says_why_by_its_return_code(code, words, fix):
    nvml = FakeNvml(Card())
    nvml.init_error = code
    answer = read(nvml)
    assert isinstance(answer, Unavailable)
    assert answer.code == code
    assert words in answer.reason
    assert fix in answer.fix


def test_a_version_mismatch_reads_as_one_sentence():
    nvml = FakeNvml(Card())
    nvml.init_error = "LIB_RM_VERSION_MISMATCH"
    assert str(read(nvml)) == (
        "NVML is not available (driver/library version mismatch); fix the driver (reboot after update)"
    )


def test_a_code_nobody_knows_is_named_by_its_number():
    nvml = FakeNvml(Card())
    nvml.init_error = "NO_DATA"
    assert read(nvml).reason == "NVML is not available (return code 21)"


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NO_PERMISSION", "GPU_IS_LOST", "RESET_REQUIRED"])
def test_a_discrete_card_that_does_not_tell_its_memory_is_never_taken_for_unified(code):
    card = Card()
    card.memory_error = code
    answer = read(FakeNvml(card))
    assert isinstance(answer, Unavailable)
    assert answer.code == code


def test_a_machine_without_cards_says_so():
    assert read(FakeNvml()).reason == "cuda:0 does not exist: this machine has 0 NVIDIA devices"


def test_the_real_bindings_without_a_driver_answer_with_a_reason(monkeypatch):
    def refuse():
        raise error("LIBRARY_NOT_FOUND")

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert VramProbe().read().code == "LIBRARY_NOT_FOUND"


# --- somebody answers -----------------------------------------------------------------------------------------------


def test_a_card_is_read_with_its_name_uuid_and_source():
    reading = read(FakeNvml(Card()))
    assert (reading.total_bytes, reading.free_bytes, reading.used_bytes) == (24 * GIB, 20 * GIB, 4 * GIB)
    assert (reading.name, reading.uuid) == ("NVIDIA GeForce RTX 4090", "GPU-aaaa-1")
    assert (reading.source, reading.stale, reading.unified) == ("nvml", False, False)


def test_others_hold_what_is_used_less_what_our_allocator_reserved():
    reading = read(FakeNvml(Card(free=10 * GIB)), allocator=AllocatorFigures(4 * GIB, 6 * GIB))
    assert reading.others_bytes == 8 * GIB
    assert read(FakeNvml(Card(free=10 * GIB)), allocator=AllocatorFigures(0, 20 * GIB)).others_bytes == 0


def test_the_safe_figure_is_taken_when_sources_disagree():
    reading = read(FakeNvml(Card(free=20 * GIB)), driver=DriverFigures(18 * GIB, 23 * GIB))
    assert (reading.total_bytes, reading.source) == (23 * GIB, "driver")
    assert (reading.free_bytes, reading.free_source) == (18 * GIB, "driver")
    assert [(figure.what, figure.source) for figure in reading.figures] == [
        ("total", "nvml"),
        ("free", "nvml"),
        ("total", "driver"),
        ("free", "driver"),
    ]


def test_every_figure_of_a_reading_has_one_moment():
    clock = Clock()
    reading = read(FakeNvml(Card()), driver=DriverFigures(GIB, GIB), allocator=AllocatorFigures(1, 2), now_s=clock)
    assert {figure.at_s for figure in reading.figures} == {100.0}
    assert {figure.what for figure in reading.figures} == {"total", "free", "allocated", "reserved"}


def test_the_driver_answers_where_nvml_cannot_and_the_problem_is_kept():
    nvml = FakeNvml(Card())
    nvml.init_error = "NO_PERMISSION"
    reading = read(nvml, driver=DriverFigures(18 * GIB, 23 * GIB))
    assert (reading.total_bytes, reading.source, reading.name) == (23 * GIB, "driver", "cuda:0")
    assert reading.problem.code == "NO_PERMISSION"


def test_users_of_the_device_are_listed():
    card = Card()
    card.users = [(4242, 3 * GIB), (17, None)]
    users = VramProbe(nvml=FakeNvml(card)).users()
    assert [(user.pid, user.used_bytes) for user in users] == [(17, None), (4242, 3 * GIB)]


def test_users_that_may_not_be_listed_do_not_spoil_the_reading():
    nvml = FakeNvml(Card())
    probe = VramProbe(nvml=nvml)
    nvml.nvmlDeviceGetGraphicsRunningProcesses = lambda handle: (_ for _ in ()).throw(error("NO_PERMISSION"))
    assert probe.users().code == "NO_PERMISSION"
    assert probe.read().total_bytes == 24 * GIB


def test_closing_balances_what_was_opened():
    nvml = FakeNvml(Card())
    probe = VramProbe(nvml=nvml)
    probe.read()
    probe.read()
    assert (nvml.num_inits, nvml.num_open) == (1, 1)
    probe.close()
    probe.close()
    assert nvml.num_open == 0


# --- vanishing while running ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["UNKNOWN", "GPU_IS_LOST", "RESET_REQUIRED"])
def test_nvml_that_vanishes_leaves_its_last_figures_marked_stale(code):
    nvml, clock = FakeNvml(Card()), Clock()
    probe = VramProbe(nvml=nvml, now_s=clock)
    probe.read()
    nvml.cards[0].memory_error = code
    clock.now = 112.5
    reading = probe.read()
    assert (reading.stale, reading.at_s, reading.age_s) == (True, 100.0, 12.5)
    assert reading.total_bytes == 24 * GIB
    assert reading.problem.code == code


def test_nvml_that_failed_is_asked_again_every_thirty_seconds():
    nvml, clock = FakeNvml(Card()), Clock()
    probe = VramProbe(nvml=nvml, now_s=clock)
    probe.read()
    nvml.init_error, nvml.cards[0].memory_error = "UNKNOWN", "UNKNOWN"
    inits = []
    for step_s in (1, 10, 29, 31, 40, 60, 62):
        clock.now = 100.0 + step_s
        assert probe.read().stale
        inits.append(nvml.num_inits)
    assert inits == [1, 1, 1, 2, 2, 2, 3]
    nvml.init_error, nvml.cards[0].memory_error = None, None
    clock.now = 191.0
    assert probe.read().stale
    clock.now = 193.0
    reading = probe.read()
    assert (reading.stale, reading.problem, reading.at_s) == (False, None, 193.0)


def test_a_card_that_comes_back_is_found_anew():
    nvml, clock = FakeNvml(Card()), Clock()
    probe = VramProbe(nvml=nvml, now_s=clock)
    probe.read()
    nvml.cards[0].memory_error = "GPU_IS_LOST"
    probe.read()
    nvml.cards[0] = Card(free=3 * GIB)
    clock.now += 30.0
    assert probe.read().free_bytes == 3 * GIB
    probe.close()
    assert nvml.num_open == 0


def test_fresh_driver_figures_win_over_stale_ones():
    nvml = FakeNvml(Card())
    probe = VramProbe(nvml=nvml)
    probe.read()
    nvml.cards[0].memory_error = "UNKNOWN"
    reading = probe.read(driver=DriverFigures(5 * GIB, 24 * GIB))
    assert (reading.stale, reading.free_bytes, reading.source) == (False, 5 * GIB, "driver")


# --- which device ---------------------------------------------------------------------------------------------------


def two_alike():
    return FakeNvml(Card(uuid="GPU-aaaa-1", free=GIB), Card(uuid="GPU-bbbb-2", free=2 * GIB))


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 1, "GPU-bbbb-2"),
        ("1,0", 0, "GPU-bbbb-2"),
        ("1,0", 1, "GPU-aaaa-1"),
        (" 1 ", 0, "GPU-bbbb-2"),
        ("GPU-bbbb-2", 0, "GPU-bbbb-2"),
        ("GPU-bb,GPU-aa", 1, "GPU-aaaa-1"),
        ("GPU-bbbb-2,0", 1, "GPU-aaaa-1"),
    ],
)
def test_the_index_counts_after_cuda_visible_devices(visible, index, uuid):
    assert read(two_alike(), index, visible=visible).uuid == uuid


@pytest.mark.parametrize(
    ("visible", "index", "num_left"),
    [("", 0, 0), ("-1", 0, 0), ("0,-1,1", 1, 1), ("0,7,1", 1, 1), ("0", 1, 1), ("0,0", 1, 1), ("void", 0, 0)],
)
def test_cuda_stops_reading_at_the_first_entry_it_does_not_know(visible, index, num_left):
    answer = read(two_alike(), index, visible=visible)
    assert answer.reason == (
        f"cuda:{index} does not exist: CUDA_VISIBLE_DEVICES is {visible!r} and leaves {num_left} of 2 devices"
    )


def test_a_uuid_is_enough_with_or_without_its_prefix():
    assert read(two_alike(), uuid="bbbb-2").uuid == "GPU-bbbb-2"
    assert read(two_alike(), uuid="GPU-aaaa-1", visible="1").uuid == "GPU-aaaa-1"


@pytest.mark.parametrize("visible", ["GPU-cccc", "GPU-", "MIG-zzzz", "MIG-GPU-aaaa-1/1/0"])
def test_a_uuid_that_names_no_single_device_is_refused(visible):
    assert read(two_alike(), visible=visible).reason == f"no NVIDIA device matches {visible!r}"


def unlike(order=None, **options):
    nvml = FakeNvml(Card("NVIDIA GeForce GT 1030", "GPU-slow", 2 * GIB, GIB), Card(uuid="GPU-fast"))
    return read(nvml, order=order, **options)


def test_among_unlike_cards_the_number_alone_is_refused_as_a_guess():
    assert unlike().fix == "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert unlike(order="FASTEST_FIRST", visible="1").fix == "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert unlike(order="PCI_BUS_ID").uuid == "GPU-slow"
    assert unlike(order="PCI_BUS_ID", visible="1").uuid == "GPU-fast"
    assert unlike(visible="GPU-fast").uuid == "GPU-fast"


# --- slices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "uuid", "total"),
    [
        ({}, "MIG-s1", 9 * GIB),
        ({"visible": "0"}, "MIG-s1", 9 * GIB),
        ({"visible": "GPU-parent"}, "MIG-s1", 9 * GIB),
        ({"visible": "MIG-s2"}, "MIG-s2", 39 * GIB),
        ({"visible": "MIG-GPU-parent/2/0"}, "MIG-s2", 39 * GIB),
        ({"uuid": "s2"}, "MIG-s2", 39 * GIB),
        ({"uuid": "GPU-parent"}, "MIG-s1", 9 * GIB),
        ({"uuid": "GPU-parent", "visible": "MIG-s2"}, "MIG-s2", 39 * GIB),
    ],
)
def test_a_slice_is_read_and_never_the_card_around_it(options, uuid, total):
    reading = read(FakeNvml(sliced_card()), **options)
    assert (reading.uuid, reading.total_bytes) == (uuid, total)


def test_a_slice_without_rights_is_an_error_and_not_its_card():
    card = sliced_card()
    card.slices[2].memory_error = "NO_PERMISSION"
    assert read(FakeNvml(card), visible="MIG-s2").code == "NO_PERMISSION"


def test_a_cut_card_without_visible_slices_is_an_error():
    card = sliced_card()
    card.slices = [None, None]
    answer = read(FakeNvml(card))
    assert answer.reason == "cuda:0 is cut in slices (MIG), but none of them can be seen"


def test_a_card_that_refuses_to_say_whether_it_is_cut_is_not_read():
    nvml = FakeNvml(Card())
    nvml.nvmlDeviceGetMigMode = lambda handle: (_ for _ in ()).throw(error("NO_PERMISSION"))
    assert read(nvml).code == "NO_PERMISSION"


def test_the_drivers_figures_of_a_slice_stand_in_when_nvml_refuses_it():
    card = sliced_card()
    card.slices[1].memory_error = "NO_PERMISSION"
    reading = read(FakeNvml(card), driver=DriverFigures(7 * GIB, 9 * GIB))
    assert (reading.total_bytes, reading.source) == (9 * GIB, "driver")


# --- unified memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NVIDIA GB10", "Orin (nvgpu)", "NVIDIA Jetson AGX Thor"])
@pytest.mark.parametrize("code", ["NOT_SUPPORTED", None])
def test_a_recognised_integrated_device_is_the_machines_one_pool(name, code):
    card = Card(name, total=0, free=0)
    card.memory_error = code
    reading = read(FakeNvml(card), allocator=AllocatorFigures(GIB, 6 * GIB), driver=DriverFigures(GIB, 2 * GIB))
    assert reading.unified
    assert (reading.total_bytes, reading.free_bytes) == (128 * GIB, 100 * GIB)
    assert reading.others_bytes == 20 * GIB
    assert reading.name == name


def test_what_cuda_says_about_integration_wins_over_the_name():
    nvml = FakeNvml(Card("NVIDIA Something New"))
    assert read(nvml, integrated=True).unified
    assert not read(FakeNvml(Card("NVIDIA GB10")), integrated=False).unified


def test_an_integrated_device_needs_no_nvml():
    nvml = FakeNvml()
    nvml.init_error = "LIBRARY_NOT_FOUND"
    assert read(nvml, integrated=True).total_bytes == 128 * GIB


def test_an_integrated_device_whose_nvml_vanishes_stays_the_one_pool():
    nvml = FakeNvml(Card("NVIDIA GB10"))
    clock = Clock()
    probe = VramProbe(nvml=nvml, host=FakeHost(), now_s=clock)
    probe.read()
    probe.close()
    nvml.init_error = "UNKNOWN"
    assert probe.read().unified
