"""The fault rows: what each demands, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: what must come of it, and the tests, as ``path::function``; the first one counts it."""

    demands: str
    tests: tuple[str, ...]


_DEVICE = "tests/faults/test_fault_device.py"

#: The rows that have tests of their own here; the others are shown where their part of the product is tested.
ROWS: dict[str, Row] = {
    "F06": Row(
        "out of memory at any chunk: whole or nothing, one more try after others gave room, then an error with numbers",
        (
            f"{_DEVICE}::test_f06_a_device_out_of_memory_at_any_chunk_gives_others_room_and_tries_once_more",
            f"{_DEVICE}::test_f06_a_second_refusal_in_a_row_is_an_error_with_its_numbers",
        ),
    ),
    "F07": Row(
        "the device is fuller than the books know: refused with the figures, and served again when it is not",
        (f"{_DEVICE}::test_f07_a_device_that_is_fuller_than_the_books_know_refuses_and_serves_again_when_it_is_not",),
    ),
    "F08": Row(
        "a sticky error: the device is never asked again, callers are told, RAM copies stay",
        (f"{_DEVICE}::test_f08_after_a_sticky_error_at_any_chunk_the_device_is_never_asked_again",),
    ),
    "F10": Row(
        "a source is not let go before its copy has landed",
        (
            f"{_DEVICE}::test_f10_a_source_is_not_let_go_before_its_copy_has_landed",
            f"{_DEVICE}::test_f10_what_was_written_on_the_device_stays_there_until_it_has_landed_in_ram",
        ),
    ),
    "F20": Row(
        "another program takes half the device: nobody who is there is harmed",
        (f"{_DEVICE}::test_f20_another_program_takes_half_the_device_and_nobody_who_is_there_is_harmed",),
    ),
}


def first_shown_by(test: str) -> list[str]:
    """The rows that this test is the first to show."""
    return [name for name, row in ROWS.items() if row.tests and row.tests[0] == test]
