"""What a configuration would get on machines that are not this one, without torch and without a device."""

from __future__ import annotations

import sys

import pytest
from nvml_fakes import GIB, Card, FakeNvml, sliced_card

from modelcache import ConfigError, Tier, load_config, planned_budgets


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plan a file's text on a machine with these cards."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def plan(text, nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        (tmp_path / "models.yaml").write_text(text)
        monkeypatch.chdir(tmp_path)
        return planned_budgets(load_config("models.yaml"))

    return plan


def without_driver(code):
    nvml = FakeNvml()
    nvml.init_error = code
    return nvml


def test_a_share_of_a_card_that_cannot_be_measured_names_the_reason_and_both_ways_out(plan):
    with pytest.raises(ConfigError) as refused:
        plan("device: cuda:0\nbudgets: {vram: 80%}\n", without_driver("LIB_RM_VERSION_MISMATCH"))
    assert str(refused.value) == (
        'models.yaml:2:17: budgets.vram: "80%" needs the size of cuda:0, but NVML is not available (driver/library '
        'version mismatch); give an absolute size such as "20GiB", or fix the driver (reboot after update)'
    )


def test_an_absolute_budget_needs_no_nvml(plan):
    got = plan("device: cuda:0\nbudgets: {vram: 20GiB}\n", without_driver("NO_PERMISSION"))
    assert (got.top, got.device, got.vram_bytes) == (Tier.VRAM, "cuda:0", 20 * GIB)
    assert (got.link_bytes_per_s, got.link) == (None, "")


def test_a_share_is_of_the_card_less_what_others_hold(plan):
    got = plan("budgets: {vram: 50%}\n", FakeNvml(Card(total=24 * GIB, free=20 * GIB)))
    assert (got.device, got.vram_bytes) == ("cuda:0", 10 * GIB)
    assert got.lines[0] == "device auto is cuda:0: NVIDIA GeForce RTX 4090"
    assert (got.link_bytes_per_s, got.link) == (25_600_000_000, "PCIe 4.0 x16, as the driver reports it")


def test_a_slice_counts_by_its_own_size_and_its_cards_link(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-s2")
    got = plan("budgets: {vram: 100%}\n", FakeNvml(sliced_card()))
    assert got.vram_bytes == 30 * GIB
    assert got.link.startswith("PCIe 4.0 x16")


def test_the_visible_devices_choose_the_card(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    nvml = FakeNvml(Card(uuid="GPU-a"), Card(uuid="GPU-b", total=80 * GIB, free=80 * GIB))
    assert plan("budgets: {vram: 100%}\n", nvml).vram_bytes == 80 * GIB


@pytest.mark.parametrize("visible", ["", "-1"])
def test_auto_without_a_visible_card_runs_in_ram_and_says_why(plan, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    got = plan("budgets: {vram: 80%}\n", FakeNvml(Card()))
    assert (got.top, got.device, got.vram_bytes) == (Tier.RAM, "host_only", 0)
    assert got.lines[0].startswith("device auto is host_only: cuda:0 does not exist: CUDA_VISIBLE_DEVICES is")


def test_the_simulated_device_brings_its_size_and_link(plan):
    got = plan(
        "device: simulated\nbudgets: {vram: 100%}\nsimulated: {capacity: 2GiB, link: 4GB/s}\n",
        without_driver("LIBRARY_NOT_FOUND"),
    )
    assert (got.vram_bytes, got.link_bytes_per_s, got.link) == (2 * GIB, 4_000_000_000, "simulated.link")
