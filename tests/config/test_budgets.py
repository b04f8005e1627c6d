"""Sizes, shares and auto against what a machine has."""

from __future__ import annotations

import pytest

from modelcache.config import settings_of
from modelcache.config.budgets import Totals, resolve_budgets
from modelcache.errors import ConfigError

GIB = 1 << 30
CARD = Totals(
    64 * GIB,
    4 * GIB,
    device="cuda:0",
    device_name="NVIDIA RTX 4090",
    vram_bytes=24 * GIB,
    vram_others_bytes=4 * GIB,
    disk_free_bytes=100 * GIB,
)


def resolve(totals: Totals, **budgets: object):
    return resolve_budgets(settings_of({f"budgets.{key}": value for key, value in budgets.items()}), totals)


def test_a_share_is_of_what_others_leave() -> None:
    found = resolve(CARD, vram="50%", ram="50%", disk="10%")
    assert (found.vram_bytes, found.ram_bytes, found.disk_bytes) == (10 * GIB, 30 * GIB, 10 * GIB)


def test_auto_is_80_percent_of_vram_and_half_of_ram_of_which_half_is_page_locked() -> None:
    found = resolve(CARD)
    assert (found.vram_bytes, found.ram_bytes) == (16 * GIB, 30 * GIB)
    assert (found.page_locked_bytes, found.disk_bytes) == (15 * GIB, 0)


def test_a_budget_above_the_card_names_both() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(CARD, vram="48GiB")
    assert str(caught.value) == (
        "budgets.vram: 48.0 GiB exceeds the 24.0 GiB of cuda:0 (NVIDIA RTX 4090); lower it or choose another device"
    )


def test_a_share_needs_a_size_that_was_measured() -> None:
    totals = Totals(
        64 * GIB,
        device="cuda:0",
        vram_problem="NVML is not available (driver/library version mismatch)",
        vram_fix="fix the driver (reboot after update)",
    )
    with pytest.raises(ConfigError) as caught:
        resolve(totals, vram="80%")
    assert str(caught.value) == (
        'budgets.vram: "80%" needs the size of cuda:0, but NVML is not available (driver/library version mismatch); '
        'give an absolute size such as "20GiB", or fix the driver (reboot after update)'
    )
    assert resolve(totals, vram="20GiB").vram_bytes == 20 * GIB


def test_a_host_only_machine_has_no_vram_and_says_so() -> None:
    found = resolve(Totals(8 * GIB), vram="20GiB", ram="4GiB")
    assert (found.vram_bytes, found.ram_bytes, found.page_locked_bytes) == (0, 4 * GIB, 0)
    assert "budgets.vram 20GiB: not used, RAM is the top tier on this machine" in found.lines


def test_one_pool_is_not_given_out_twice() -> None:
    totals = Totals(100 * GIB, device="cuda:0", device_name="NVIDIA GB10", is_unified=True)
    found = resolve(totals)
    assert found.vram_bytes + found.ram_bytes <= 100 * GIB
    with pytest.raises(ConfigError, match="exceeds the 100.0 GiB that both share"):
        resolve(totals, vram="60GiB", ram="60GiB")


def test_page_locked_is_a_part_of_ram() -> None:
    with pytest.raises(ConfigError, match="exceeds budgets.ram, 4.0 GiB, of which it is a part"):
        resolve(CARD, ram="4GiB", page_locked="8GiB")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(CARD, vram="48GiB", ram="100GiB")
    assert [finding.key for finding in caught.value.findings] == ["budgets.vram", "budgets.ram"]


def test_one_segment_of_ram_is_kept_ready_unless_the_budget_is_small() -> None:
    assert resolve(CARD, ram="2GiB").ram_spare_bytes == 64 << 20
    assert resolve(CARD, ram="2047MiB").ram_spare_bytes == 0
    assert resolve(CARD, ram="4GiB", ram_spare="none").ram_spare_bytes == 0
    assert resolve(CARD, ram="4GiB", ram_spare="1GiB").ram_spare_bytes == GIB


def test_what_is_kept_ready_is_a_part_of_ram() -> None:
    with pytest.raises(ConfigError, match=r"budgets.ram_spare: 4.0 GiB leaves nothing of budgets.ram, 4.0 GiB"):
        resolve(CARD, ram="4GiB", ram_spare="4GiB")
