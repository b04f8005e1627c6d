"""The fault rows: what each demands, and the tests that show it, wherever they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: what must come of it, and the tests; or why no test here shows it.

    A test is ``path::function`` below `tests`, or with the id of one example, ``path::function[id]``.
    """

    demands: str
    tests: tuple[str, ...] = ()
    why_not: str = ""

    def is_shown(self, passed: Collection[str], failed: Collection[str]) -> bool:
        """Whether each of its tests passed, in every example that was run."""
        return bool(self.tests) and all(_ran(test, passed) and not _ran(test, failed) for test in self.tests)


def _ran(test: str, ids: Collection[str]) -> bool:
    return f"tests/{test}" in ids


def with_functions(ids: Collection[str]) -> set[str]:
    """Ids of examples, and of the functions that they are examples of."""
    return {*ids, *(each.partition("[")[0] for each in ids)}


def shown(passed: Collection[str], failed: Collection[str]) -> list[str]:
    """The rows that a run has shown, by name, with what they demand."""
    passed, failed = with_functions(passed), with_functions(failed)
    return [f"{name} {row.demands}" for name, row in ROWS.items() if row.is_shown(passed, failed)]


_CACHE, _LEASES, _STALLS = (
    "test_cache.py::test_",
    "lifecycle/test_leaked_leases.py::test_",
    "lifecycle/test_stalls.py::",
)
_DEVICE, _USERS, _MOVER = (
    "faults/test_fault_device.py::test_",
    "faults/test_fault_users.py::test_",
    "dataplane/test_mover",
)
_ENDS = "processes/test_ends.py::test_a_process_that_is_ended_leaves_nothing_that_the_next_one_believes"
_LIMITS = "processes/test_limits.py::test_what_a_process_runs_into"
_VRAM, _RAM, _GAUGE = (f"dataplane/test_probe_{which}.py::test_" for which in ("vram", "ram", "gauge"))
_HEADERS, _FILES, _IMAGES = (
    "test_headers.py::test_",
    "config/test_files.py::test_",
    "dataplane/test_image_files.py::test_",
)
_WEIGHTS, _SIGNALS = "dataplane/test_weights.py::test_", "lifecycle/test_signals.py::test_"

ROWS: dict[str, Row] = {
    "F01": Row(
        "a loader raises: everybody who waits is told, and nothing stays reserved",
        (
            f"{_CACHE}when_a_loader_fails_each_waiter_gets_an_exception_of_its_own_with_the_same_cause",
            "core/test_machine.py::test_from_the_third_failure_in_a_row_requests_are_refused_until_the_back_off_has_passed",
            f"{_MOVER}_faults.py::test_what_a_loader_raises_is_told_with_its_cause_and_nothing_stays",
        ),
    ),
    "F02": Row(
        "a loader returns what is no model, or another's: refused by name",
        (
            f"{_CACHE}a_loader_that_returns_something_else_is_named",
            "dataplane/test_loaders.py::test_a_callable_that_breaks_its_contract_is_a_loader_error",
            "dataplane/test_loaders.py::test_a_registered_handle_is_not_taken_for_a_model",
        ),
    ),
    "F03": Row(
        "a loader hangs: seen, others are served, closing does not hang",
        (
            f"{_STALLS}test_a_loader_that_hangs_is_seen_although_others_are_served",
            f"{_CACHE}a_timeout_while_loading_names_the_load_and_the_load_goes_on",
            "lifecycle/test_closes.py::test_closing_gives_loaders_that_hang_their_time_and_names_them",
        ),
    ),
    "F04": Row(
        "a loader leaves memory on the device: not the model's, and named when it is in the way",
        (
            f"{_USERS}f04_what_a_loader_leaves_on_the_device_is_not_counted_as_the_models_and_is_named_when_it_is_in_the_way",
            f"{_MOVER}.py::test_a_model_that_the_loader_put_on_the_device_is_taken_from_there",
        ),
    ),
    "F05": Row(
        "a loader asks the cache: served, and a circle is named",
        (
            f"{_CACHE}a_loader_may_get_another_model",
            f"{_CACHE}loaders_that_wait_for_each_other_are_told_and_both_models_stay_usable_later",
            f"{_CACHE}a_loader_that_gets_its_own_model_is_told",
        ),
    ),
    "F06": Row(
        "out of memory at any chunk: whole or nothing, one more try after others gave room, then an error with numbers",
        (
            f"{_DEVICE}f06_a_device_out_of_memory_at_any_chunk_gives_others_room_and_tries_once_more",
            f"{_DEVICE}f06_a_second_refusal_in_a_row_is_an_error_with_its_numbers",
        ),
    ),
    "F07": Row(
        "the device is fuller than the books know: refused with the figures, served again when it is not",
        (f"{_DEVICE}f07_a_device_that_is_fuller_than_the_books_know_refuses_and_serves_again_when_it_is_not",),
    ),
    "F08": Row(
        "a sticky error: the device is never asked again, callers are told, RAM copies stay",
        (f"{_DEVICE}f08_after_a_sticky_error_at_any_chunk_the_device_is_never_asked_again",),
    ),
    "F09": Row(
        "the device is lost: as a sticky error, and health says so",
        (
            "scars/test_scars_devices.py::test_s20_a_lost_device_is_asked_for_nothing_more_and_says_so",
            "dataplane/device/test_cuda_facts.py::test_errors_that_cost_the_context_are_known_by_their_code",
        ),
    ),
    "F10": Row(
        "a source is not let go before its copy has landed",
        (
            f"{_DEVICE}f10_a_source_is_not_let_go_before_its_copy_has_landed",
            f"{_DEVICE}f10_what_was_written_on_the_device_stays_there_until_it_has_landed_in_ram",
        ),
    ),
    "F11": Row(
        "a copy over the link damages a byte",
        why_not="links check themselves (PCIe: CRC and replay); what is read from files is compared, see F31",
    ),
    "F12": Row(
        "RAM cannot be had for a victim: it stays usable, and another one goes",
        (
            "core/test_machine.py::test_a_victim_that_cannot_move_stays_and_another_goes",
            f"{_MOVER}_faults.py::test_a_trim_that_ram_cannot_take_leaves_the_model_on_the_device",
            f"{_LIMITS}[no_memory]",
        ),
    ),
    "F13": Row(
        "page-locking is refused: ordinary memory, one warning, no failure",
        ("dataplane/test_blocks.py::test_a_refusal_is_one_warning_and_ordinary_memory",),
    ),
    "F14": Row(
        "page-locked memory of odd sizes: exact sizes, charged as they are",
        (
            "dataplane/test_blocks.py::test_a_piece_takes_whole_pages_and_holds_its_payload",
            "dataplane/test_blocks.py::test_page_locking_stays_within_its_budget",
        ),
    ),
    "F15": Row(
        "no NVML: the reason is said, and a share of what nobody measured is refused",
        (
            f"{_VRAM}nvml_that_does_not_start_says_why_by_its_return_code",
            "config/test_budgets.py::test_a_share_needs_a_size_that_was_measured",
        ),
    ),
    "F16": Row(
        "NVML vanishes: the last figures, marked stale, asked again every 30 s",
        (
            f"{_VRAM}nvml_that_vanishes_leaves_its_last_figures_marked_stale",
            f"{_VRAM}nvml_that_failed_is_asked_again_every_thirty_seconds",
            f"{_GAUGE}nvml_that_vanishes_leaves_the_last_figures_and_is_asked_again_later",
        ),
    ),
    "F17": Row(
        "a card that is the machine's one pool: its memory is not given out twice",
        (
            f"{_VRAM}a_recognised_integrated_device_is_the_machines_one_pool",
            "config/test_budgets.py::test_one_pool_is_not_given_out_twice",
        ),
    ),
    "F18": Row(
        "a discrete card that does not tell its memory is not taken for unified",
        (
            f"{_VRAM}a_discrete_card_that_does_not_tell_its_memory_is_never_taken_for_unified",
            f"{_VRAM}a_slice_without_rights_is_an_error_and_not_its_card",
            f"{_VRAM}a_version_mismatch_reads_as_one_sentence",
        ),
    ),
    "F19": Row("a slice is read, never the card around it", (f"{_VRAM}a_slice_is_read_and_never_the_card_around_it",)),
    "F20": Row(
        "another program takes half the device: nobody who is there is harmed",
        (
            f"{_DEVICE}f20_another_program_takes_half_the_device_and_nobody_who_is_there_is_harmed",
            "test_pressure.py::test_what_others_take_of_the_device_is_given_up_and_comes_back",
        ),
    ),
    "F21": Row(
        "a control group allows less than the host has: that binds",
        (f"{_RAM}a_version_2_limit_binds_below_the_host", f"{_RAM}a_parent_slice_binds_over_a_looser_leaf"),
    ),
    "F22": Row(
        "a control group's limit is lowered at run time: kept to",
        (
            f"{_RAM}a_limit_lowered_at_run_time_is_seen_by_the_next_reading",
            "test_pressure.py::test_a_control_groups_limit_lowered_while_the_cache_runs_is_kept_to_and_its_files_may_vanish",
        ),
    ),
    "F23": Row("the process is killed: the next one clears up", (f"{_ENDS}[killed_with_eight_loads_in_flight]",)),
    "F24": Row(
        "killed in a spill: only whole files are believed, the rest is swept",
        (
            f"{_ENDS}[killed_in_a_spill]",
            f"{_ENDS}[terminated_in_a_spill]",
            f"{_ENDS}[killed_around_the_rename]",
            f"{_ENDS}[killed_in_a_kept_image]",
        ),
    ),
    "F25": Row(
        "a full disk: the error has path, need and free; nothing is left, the model stays",
        (f"{_LIMITS}[full_disk]", f"{_IMAGES}a_failing_write_leaves_no_file_and_names_path_need_and_free"),
    ),
    "F26": Row(
        "short and failing reads: continued, or an error with the offset",
        (
            f"{_WEIGHTS}short_reads_are_continued",
            f"{_WEIGHTS}a_signal_is_handled_during_a_read_and_the_read_goes_on",
            f"{_WEIGHTS}a_read_error_names_the_file_and_the_offset",
        ),
    ),
    "F27": Row(
        "a file is truncated: an error, no SIGBUS",
        (
            f"{_LIMITS}[a_file_truncated_while_it_is_read]",
            f"{_LIMITS}[a_file_truncated_after_it_was_loaded]",
        ),
    ),
    "F28": Row("a file is replaced: never a mix of two", (f"{_LIMITS}[a_file_renamed_over_while_it_is_read]",)),
    "F29": Row("a file is overwritten in place: said", (f"{_LIMITS}[a_file_overwritten_in_place_while_it_is_read]",)),
    "F30": Row("a file is deleted: copies work on, a reload says so", (f"{_LIMITS}[a_file_deleted]",)),
    "F31": Row(
        "bits of an image file flip: found, and read again from the source",
        (
            f"{_IMAGES}a_flipped_bit_in_a_tensor_is_found_and_named",
            f"{_MOVER}_faults.py::test_a_damaged_image_file_of_a_readable_part_is_replaced_by_its_source",
        ),
    ),
    "F32": Row(
        "two processes share a folder: they leave each other's files alone",
        (
            f"{_ENDS}[two_processes_share_a_folder]",
            "dataplane/test_image_directory.py::test_two_at_a_time_leave_each_other_alone",
        ),
    ),
    "F33": Row(
        "names and paths that lead out: refused before any file is asked for",
        (
            "test_registry.py::test_what_cannot_be_used_is_refused_in_words",
            "config/test_layers.py::test_a_root_allows_what_leaves_the_folder_of_the_file",
            "config/test_crossing.py::test_a_link_out_of_the_folder_needs_a_root_as_well",
        ),
    ),
    "F34": Row(
        "a link in place of a file or folder of ours: not followed",
        (
            f"{_IMAGES}a_file_that_is_gone_or_a_link_is_an_error",
            "dataplane/test_kept_images.py::test_a_folder_that_is_a_link_is_not_used",
        ),
    ),
    "F35": Row(
        "a pipe, folder, socket or device as weights: refused by its type",
        (
            f"{_HEADERS}what_is_no_regular_file_is_refused_by_its_type",
            "dataplane/test_file_reading.py::test_a_path_that_became_a_pipe_or_a_folder_is_refused_without_waiting",
        ),
    ),
    "F36": Row(
        "malicious headers: refused in words",
        (
            f"{_HEADERS}a_hostile_or_broken_file_is_refused_in_words",
            "hostile/test_header_table.py::test_a_refusal_names_the_file_the_place_and_what_to_do",
        ),
    ),
    "F37": Row("an index that lies: refused by entry", (f"{_HEADERS}an_index_that_lies_is_refused_by_entry",)),
    "F38": Row(
        "what is no safetensors under its name: told by its content",
        (
            f"{_HEADERS}a_hostile_or_broken_file_is_refused_in_words",
            f"{_HEADERS}a_pickle_by_name_is_refused_before_it_is_opened",
        ),
    ),
    "F39": Row(
        "YAML bombs: refused by caps",
        (
            f"{_FILES}doubling_aliases_are_never_expanded",
            f"{_FILES}a_deep_file_neither_crashes_nor_takes_long",
            f"{_FILES}a_file_that_is_too_large_is_not_parsed",
            f"{_FILES}what_is_not_a_plain_mapping_is_answered_in_one_line",
        ),
    ),
    "F40": Row(
        "wrong keys and values: line, key, choices, the nearest word",
        ("config/test_findings.py::test_a_broken_file_is_answered_with_place_and_fix",),
    ),
    "F41": Row(
        "budgets that cannot hold what they are for",
        (
            f"{_CACHE}a_model_larger_than_a_budget_is_refused_and_nobody_is_evicted",
            "config/test_budgets.py::test_a_budget_above_the_card_names_both",
        ),
    ),
    "F42": Row(
        "who holds a lease dies: it comes back",
        (
            f"{_LEASES}a_lease_dropped_open_is_named_with_its_site_and_is_nobodys_any_more",
            f"{_CACHE}a_task_that_dies_with_a_lease_gives_it_back",
        ),
    ),
    "F43": Row(
        "a lease is kept for ever: named, and only those who need its room wait",
        (
            f"{_LEASES}a_lease_that_is_kept_for_ever_holds_up_only_those_who_need_its_room",
            f"{_CACHE}a_caller_whose_time_is_up_learns_what_it_waited_for_and_who_holds_it",
        ),
    ),
    "F44": Row(
        "returned twice, used afterwards",
        ("test_lease.py::test_a_second_return_does_nothing", f"{_CACHE}a_lease_cannot_be_used_once_it_was_returned"),
    ),
    "F45": Row(
        "cancelled at each await",
        ("stateful/test_cancelling.py::test_a_task_cancelled_at_any_await_loses_nothing_and_disturbs_nobody",),
    ),
    "F46": Row(
        "the deadline comes with the answer: one of them, and nothing is lost",
        (
            "runtime/test_driver.py::test_an_answer_that_comes_with_the_timeout_is_one_of_them_and_loses_nothing",
            "runtime/test_waiters.py::test_of_an_offer_and_a_leave_at_once_exactly_one_comes_first",
        ),
    ),
    "F47": Row(
        "an event loop is closed meanwhile",
        (f"{_CACHE}a_loop_that_closes_while_its_task_waits_leaves_nothing_behind",),
    ),
    "F48": Row(
        "the same thread asks again",
        (f"{_CACHE}the_same_thread_may_enter_twice_even_where_one_lease_is_allowed",),
    ),
    "F49": Row(
        "two hold what the other wants: told",
        (f"{_CACHE}callers_that_hold_and_wait_in_a_circle_are_told_apart",),
    ),
    "F50": Row(
        "the wall clock jumps: nothing changes",
        (f"{_USERS}f50_a_wall_clock_that_jumps_changes_neither_the_order_of_use_nor_a_deadline",),
    ),
    "F51": Row(
        "a fork, also with the lock held",
        (
            f"{_LIMITS}[forked_with_the_lock_held]",
            f"{_LIMITS}[forked_in_the_middle_of_what_a_process_has_once]",
            f"{_LIMITS}[a_data_loader_of_forked_workers]",
            "processes/test_ends.py::test_workers_that_are_started_anew_have_caches_of_their_own",
        ),
    ),
    "F52": Row(
        "Ctrl-C anywhere, also again and again",
        (
            f"{_SIGNALS}a_storm_of_ctrl_c_harms_nobody",
            f"{_SIGNALS}a_close_that_was_interrupted_can_be_done_again_and_leaves_nothing",
            "test_door.py::test_an_interrupt_at_any_bytecode_of_a_hit_loses_no_lease",
            "processes/test_ends.py::test_ctrl_c_ends_a_script_that_waits_for_a_model",
        ),
    ),
    "F53": Row("SIGTERM with eight loads in flight", (f"{_ENDS}[killed_with_eight_loads_in_flight]",)),
    "F54": Row(
        "a worker meets what no loader should raise, or a bug: it lives on, or says so",
        (
            f"{_CACHE}a_loader_that_raises_no_exception_but_an_exit_keeps_the_workers_alive",
            f"{_CACHE}an_unexpected_error_of_the_data_plane_is_wrapped_and_survived",
            "runtime/test_driver.py::test_a_bug_of_its_own_stops_deciding_leaves_nobody_waiting_and_says_so",
        ),
    ),
    "F55": Row(
        "a callback raises, blocks, or calls the cache",
        tuple(
            f"lifecycle/test_callbacks.py::test_{each}"
            for each in (
                "a_callback_that_raises_is_reported_and_the_next_one_runs",
                "a_callback_that_hangs_holds_up_no_move_and_no_other_future",
                "a_callback_may_call_the_cache",
            )
        ),
    ),
    "F56": Row(
        "pointing a model elsewhere fails half way: undone",
        (f"{_MOVER}_faults.py::test_a_failing_re_pointing_is_undone",),
    ),
    "F57": Row(
        "written to while parked: seen, and kept",
        (
            "test_writes_are_seen.py::test_a_write_to_a_parked_model_survives_its_spill",
            "test_writes_are_seen.py::test_a_write_to_a_parked_model_survives_a_source_that_can_be_read_again",
        ),
    ),
    "F58": Row(
        "ties, views, buffers, subclasses: whole after every trip, or refused at the first load",
        (
            f"{_MOVER}.py::test_any_legal_sequence_of_moves_keeps_every_bit",
            "dataplane/test_wrappers.py::test_a_wrapped_weight_round_trips_through_every_tier",
            f"{_MOVER}_faults.py::test_what_cannot_be_moved_is_refused_when_it_is_loaded",
        ),
    ),
    "F59": Row(
        "a size that cannot be, or is not the model's",
        (
            "test_registry.py::test_what_cannot_be_used_is_refused_in_words",
            f"{_USERS}f59_a_size_that_is_not_the_models_is_put_right_by_its_load_and_others_give_what_is_lacking",
            "core/test_machine.py::test_a_size_found_too_large_by_the_load_is_remembered_and_nothing_is_read_again",
        ),
    ),
    "F60": Row(
        "a hundred thousand models or leases; more waiters than allowed",
        (
            "test_registry.py::test_a_hundred_thousand_models_are_found_by_name_and_a_typo_is_still_answered",
            f"{_USERS}f60_a_hundred_thousand_leases_on_one_model_are_counted_and_returned",
            f"{_CACHE}too_many_waiting_callers_are_refused",
        ),
    ),
    "F61": Row(
        "a budget is lowered below what is leased",
        (f"{_CACHE}a_lowered_budget_is_reached_as_leases_are_returned",),
    ),
    "F62": Row(
        "unregistered while leased, while loading, twice",
        (
            f"{_CACHE}a_leased_model_leaves_when_its_lease_is_returned",
            f"{_CACHE}unregistering_twice_is_an_error_that_says_so",
            "scars/test_scars_books.py::test_s05_what_ends_late_does_not_end_its_successor",
        ),
    ),
    "F63": Row(
        "closed in the middle of anything, twice, at exit",
        (
            f"{_CACHE}closing_in_the_middle_of_a_step_lets_it_end_and_leaves_nothing",
            f"{_CACHE}closing_twice_and_from_many_threads_is_fine",
            "processes/test_ends.py::test_an_interpreter_that_ends_closes_its_cache",
        ),
    ),
    "F64": Row(
        "a subscriber raises or blocks",
        (
            f"{_CACHE}subscribers_are_told_until_they_end_it_and_one_that_raises_disturbs_nobody",
            f"{_CACHE}a_subscriber_that_blocks_holds_up_no_move",
        ),
    ),
    "F65": Row("standard output is closed", (f"{_LIMITS}[closed_stdout]",)),
    "F66": Row(
        "comparisons: arms and weights that cannot be, an arm that fails",
        (
            "ab/test_assignment.py::test_a_split_that_cannot_be_is_refused_in_words",
            "ab/test_compare.py::test_an_arm_that_does_not_come_up_is_recorded_and_the_others_are_compared",
            "ab/test_compare.py::test_bad_input_is_refused_in_words_before_anything_is_loaded",
        ),
    ),
    "F67": Row("an HTTP client leaves or sends nonsense", why_not="there is no server"),
    "F68": Row("ten thousand connections", why_not="there is no server"),
    "F69": Row(
        "operations stand still and end in another order",
        (
            "simulation/test_schedules.py::test_every_schedule_keeps_every_promise",
            "simulation/test_schedules.py::test_once_faults_are_healed_everything_ends_and_everybody_is_served",
            "simulation/test_shipped_schedules.py::test_once_faults_are_healed_the_shipped_mover_serves_everybody",
        ),
    ),
    "F70": Row("two faults at once", why_not="it takes hours: make soak plays schedules with several faults in each"),
}
