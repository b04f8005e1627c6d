"""Sizes, shares, speeds and durations: as people write them, and as they are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.units import format_bytes, format_seconds, parse_bytes, parse_duration, parse_percent, parse_rate

TEXTS = st.text(max_size=60) | st.from_regex(r"-?[0-9]{0,400}(\.[0-9]{0,400})?\s?[A-Za-z%/]{0,4}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'cannot read \'\'; write a size such as "18GiB" (1024-based) or "18GB" (1000-based)'),
        ("18 gigs", "unknown unit 'gigs'; use GB or GiB, e.g. \"18GiB\""),
        ("1,5GiB", 'cannot read \'1,5GiB\'; write a size such as "18GiB" (1024-based) or "18GB" (1000-based)'),
        ("1e3GiB", 'cannot read \'1e3GiB\'; write a size such as "18GiB" (1024-based) or "18GB" (1000-based)'),
        ("\uff11GiB", 'cannot read \'\uff11GiB\'; write a size such as "18GiB" (1024-based) or "18GB" (1000-based)'),
        ("16 Gb", "unknown unit 'Gb' (gigabits?); use GB or GiB, e.g. \"16GiB\""),
        ("24Gi", "unknown unit 'Gi'; use GB or GiB, e.g. \"24GiB\""),
        ("8k", "unknown unit 'k'; use KB or KiB, e.g. \"8KiB\""),
        ("5 XB", "unknown unit 'XB'; use GB or GiB, e.g. \"16GiB\""),
        ("16", '16 bytes is smaller than any model; add a unit: "16GiB"'),
        ("17179869184", '17179869184 has no unit; write "17179869184B", or a size such as "16GiB"'),
        ("0", "must be greater than 0, got 0"),
        ("-4GiB", "must be greater than 0, got -4GiB"),
        ("0GiB", "must be greater than 0, got 0GiB"),
        ("0.0000001B", "must be greater than 0, got 0.0000001B"),
    ],
)
def test_what_is_no_size_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1B", 1),
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        (" 1.5 MiB ", 3 << 19),
        ("4.35GB", 4_350_000_000),
        ("0.29GB", 290_000_000),
        ("2TiB", 2 << 40),
    ],
)
def test_a_size_is_exact(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@given(TEXTS)
def test_whatever_the_text_a_size_is_a_positive_int_or_a_short_refusal(text: str) -> None:
    for parse in (parse_bytes, parse_rate):
        try:
            size_bytes = parse(text)
        except ValueError as error:
            assert len(str(error)) < 300
            assert str(error).isprintable()
        else:
            assert isinstance(size_bytes, int)
            assert size_bytes > 0


@given(TEXTS)
def test_whatever_the_text_a_duration_is_finite_or_refused(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        assert len(str(error)) < 300
    else:
        assert seconds is None or 0 <= seconds < float("inf")


def test_a_share_is_a_fraction_and_anything_else_is_none() -> None:
    assert parse_percent("80%") == 0.8
    assert parse_percent(" 12.5 % ") == 0.125
    assert parse_percent("80") is None
    assert parse_percent("-5%") is None


@pytest.mark.parametrize("text", ["120%", "0%", "100.1%"])
def test_a_share_is_above_nothing_and_at_most_all(text: str) -> None:
    with pytest.raises(ValueError, match="%"):
        parse_percent(text)


@pytest.mark.parametrize("text", ["8GB", "8GB/m", "8/s", "/s", "8GB/s/s", "0GB/s"])
def test_a_speed_needs_a_size_and_a_second(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rate(text)


def test_a_speed_is_bytes_in_a_second() -> None:
    assert parse_rate("8GB/s") == 8_000_000_000
    assert parse_rate("25 GiB/s") == 25 << 30


@pytest.mark.parametrize("text", ["", "3:30", "10", "10 m", "1.5.5s", "s", "-5s", "10min", "1m 30s", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'write a duration such as "90s", "10m", "1m30s" or "never"'):
        parse_duration(text)


def test_durations_add_up_and_never_is_none() -> None:
    assert parse_duration("1m30s") == 90
    assert parse_duration("250ms") == 0.25
    assert parse_duration("1.5h") == 5400
    assert parse_duration("2d") == 172_800
    assert parse_duration(" never ") is None


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (87 << 20, "87 MiB"),
        (22 << 30, "22.0 GiB"),
        (5 << 40, "5120.0 GiB"),
        (-(5 << 20), "-5.0 MiB"),
    ],
)
def test_sizes_are_shown_in_binary_units_without_1024_of_anything(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(min_value=1, max_value=1 << 50))
def test_what_is_shown_reads_back_to_within_its_precision(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.0005, "500 us"),
        (0.0123, "12.3 ms"),
        (0.92, "0.92 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (200.0, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500.0, "2 h 5 min"),
    ],
)
def test_durations_are_shown_without_60_of_anything(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
