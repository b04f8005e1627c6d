"""What the machine decides, told as stories: who gives room, who waits, who is refused and why."""

from __future__ import annotations

import pytest
from scenes import Scene, error_of, got, model, of_kind
from worlds import part

from modelcache.core.machine import MAX_BACKOFF_S, Budgets
from modelcache.core.messages import (
    Closing,
    Done,
    LoadDone,
    MoveDone,
    Pinned,
    Registered,
    WantBudget,
    WantCopy,
    WantDown,
    WantGone,
    WantLease,
    WantRoom,
)
from modelcache.core.records import Loading
from modelcache.core.wants import MAX_OVERTAKEN
from modelcache.errors import (
    BudgetExhaustedError,
    CacheClosedError,
    DeviceMemoryError,
    DevicePoisonedError,
    InvalidTransitionError,
    LeaseCycleError,
    LeaseError,
    ModelTooLargeError,
    MoveError,
    QueueFullError,
    UnknownModelError,
)
from modelcache.move import Moved, MoveKind, Reason
from modelcache.spec import Priority
from modelcache.tier import Tier

# --- failures first ---------------------------------------------------------------------------------------------------


def test_a_loader_that_fails_refuses_everybody_who_waits_and_the_next_request_loads_again():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    first, second = scene.lease("a"), scene.lease("a")
    scene.load_fails("a", OSError("no such file"))
    assert str(error_of(first)) == str(error_of(second)) == "no such file"
    assert scene.state("a") == "failed"
    assert got(scene.get("a"))


def test_from_the_third_failure_in_a_row_requests_are_refused_until_the_back_off_has_passed():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    for _ in range(3):
        caller = scene.lease("a")
        scene.load_fails("a", OSError("flaky"))
        error_of(caller)
    early = scene.lease("a")
    assert str(error_of(early)) == "flaky"
    assert not scene.loads
    scene.now_s = 1.01
    late = scene.lease("a")
    assert scene.loads
    scene.load_fails("a", OSError("flaky"))
    scene.now_s = 2.5
    assert str(error_of(scene.lease("a"))) == "flaky"
    scene.now_s = 3.1
    scene.lease("a")
    assert scene.loads
    del late


def test_the_back_off_has_a_bound_and_ends_with_the_first_success():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    for _ in range(30):
        scene.lease("a")
        scene.load_fails("a", OSError("flaky"))
        scene.now_s += MAX_BACKOFF_S + 1
    assert scene.machine.model("a").retry_at_s <= scene.now_s
    scene.use("a")
    assert scene.machine.model("a").failures == 0


def test_a_failed_promotion_refuses_who_waits_and_the_model_stays_parked():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    caller = scene.lease("a")
    scene.step()  # its load
    scene.step()  # disk -> RAM
    scene.move_fails("a", MoveError("a", "ram", "vram", "broke"))
    assert str(error_of(caller)) == str(MoveError("a", "ram", "vram", "broke"))
    assert scene.state("a") == "parked"
    assert got(scene.get("a"))


def test_a_device_that_is_out_of_memory_is_tried_once_more_after_others_gave_up_more():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b")
    caller = scene.lease("c")
    scene.step()
    scene.step()
    scene.given_up()
    scene.move_fails("c", DeviceMemoryError("c", "sim:0", 2, 0))
    scene.settle()
    assert scene.given_up() == [("trim", "a")]
    assert got(caller)


def test_a_second_out_of_memory_in_a_row_is_the_callers():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2))
    scene.use("a")
    caller = scene.lease("b")
    scene.step()
    scene.step()
    for _ in range(2):
        while "b" not in scene.moves:
            assert scene.step()
        scene.move_fails("b", DeviceMemoryError("b", "sim:0", 2, 0))
    scene.settle()
    assert isinstance(error_of(caller), DeviceMemoryError)
    assert scene.state("b") == "parked"


def test_a_poisoned_device_refuses_everybody_and_is_never_asked_again():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2))
    scene.use("a")
    first = scene.lease("b")
    scene.step()
    scene.step()
    scene.move_fails("b", DevicePoisonedError("sim:0", "illegal access"))
    assert isinstance(error_of(first), DevicePoisonedError)
    for name in ("a", "b"):
        assert isinstance(error_of(scene.lease(name)), DevicePoisonedError)
        assert scene.gates[name].closed
    assert not scene.moves


def test_a_model_that_waits_to_be_forgotten_is_forgotten_although_the_device_is_lost_meanwhile():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2))
    holder = scene.get("a")
    gone = scene.ask(WantGone("a", None))
    scene.lease("b")
    scene.step()
    scene.step()
    scene.move_fails("b", DevicePoisonedError("sim:0", "illegal access"))
    assert gone.answer is None
    scene.leave(holder)
    scene.settle()
    assert isinstance(gone.answer, Done)
    assert set(scene.machine.books.models) == {"b"}


def test_so_is_one_whose_own_bytes_are_let_go_as_the_device_is_lost():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2))
    scene.use("a")
    scene.lease("b")
    scene.step()
    scene.step()
    gone = scene.ask(WantGone("a", None))
    while "a" not in scene.moves:
        assert scene.step()
    for name in ("b", "a"):
        scene.move_fails(name, DevicePoisonedError("sim:0", "illegal access"))
    scene.settle()
    assert isinstance(gone.answer, Done)
    assert set(scene.machine.books.models) == {"b"}
    assert scene.machine.books.vram.resident_bytes == 0


def test_a_pin_that_comes_after_its_model_has_left_changes_nothing():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    scene.ask(WantGone("a", None))
    scene.settle()
    scene.tell(Pinned("a", Tier.VRAM))
    assert not scene.machine.books.models


def test_a_victim_that_cannot_move_stays_and_another_goes():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b")
    caller = scene.lease("c")
    while "a" not in scene.moves:
        scene.step()
    scene.move_fails("a", MoveError("a", "vram", "ram", "no host memory"))
    scene.settle()
    assert got(caller)
    assert scene.states() == {"a": "ready", "b": "parked", "c": "ready"}


def test_when_the_only_victim_cannot_move_the_request_is_refused_instead_of_waiting_for_nothing():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    scene.use("a")
    caller = scene.lease("b")
    while "a" not in scene.moves:
        scene.step()
    scene.move_fails("a", MoveError("a", "vram", "ram", "broke"))
    scene.settle()
    assert isinstance(error_of(caller), BudgetExhaustedError)
    assert scene.state("a") == "ready"


@pytest.mark.parametrize(("disk", "kind"), [(8, "evict"), (0, "trim")])
def test_what_only_vram_holds_makes_room_although_ram_has_none_for_it(disk, kind):
    scene = Scene(Budgets(ram=4, vram=6, disk=disk), *(model(name, 2) for name in "abcd"))
    scene.use("a", "b", "c")
    assert scene.where("a") == (1, 1), "RAM gave up what VRAM holds"
    scene.machine.books.parts["a"].source_stale = True
    scene.pin("b", Tier.VRAM)
    scene.pin("c", Tier.VRAM)
    scene.given_up()
    caller = scene.lease("d")
    scene.settle()
    assert got(caller)
    assert (kind, "a") in scene.given_up()


def test_a_request_beyond_the_waiters_allowed_is_refused_at_once():
    scene = Scene(Budgets(ram=4, vram=4, max_waiters=2), model("a", 2))
    scene.lease("a")
    scene.lease("a")
    error = error_of(scene.lease("a"))
    assert isinstance(error, QueueFullError)
    assert (error.num_waiting, error.limit) == (2, 2)


def test_a_name_nobody_registered_is_refused():
    scene = Scene(Budgets(ram=4, vram=4), model("a", 2))
    assert isinstance(error_of(scene.lease("b")), UnknownModelError)


def test_registering_twice_is_a_bug_of_the_caller():
    scene = Scene(Budgets(ram=4, vram=4), model("a", 2))
    with pytest.raises(InvalidTransitionError, match="'?a'? cannot take Registered"):
        scene.tell(Registered(model("a", 2)[0]))


def test_completions_of_another_generation_change_nothing():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    scene.use("a")
    before = scene.machine.books.parts["a"].copy()
    scene.event(MoveDone("a", 77, Moved(0, 0.0)))
    scene.event(LoadDone("a", 77, model("a", 3)[1]))
    assert scene.machine.books.parts["a"].residency == before.residency
    assert scene.machine.books.parts["a"].facts == before.facts


def test_a_load_that_was_given_up_for_a_later_one_cannot_end_it():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    scene.lease("a")
    scene.load_fails("a", OSError("no such file"))
    caller = scene.lease("a")
    scene.event(LoadDone("a", scene.loads["a"] - 1, model("a", 3)[1]))
    assert scene.machine.model("a").loading is Loading.LOADING
    scene.settle()
    assert got(caller)
    assert scene.machine.books.parts["a"].facts == model("a", 2)[1].parts[0]


def test_a_move_that_ended_before_cannot_end_the_present_one():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    caller = scene.lease("a")
    scene.step()  # its load
    scene.step()  # disk -> RAM; now it is on its way up
    scene.event(MoveDone("a", scene.moves["a"].generation - 1, Moved(0, 0.0)))
    assert caller.answer is None
    assert scene.machine.books.parts["a"].flight is not None
    scene.settle()
    assert got(caller)


def test_closing_refuses_everybody_and_whoever_comes_later():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    holder = scene.get("a")
    waiting = scene.lease("b")
    scene.settle()
    scene.event(Closing())
    assert isinstance(error_of(waiting), CacheClosedError)
    assert isinstance(error_of(scene.lease("a")), CacheClosedError)
    assert scene.gates["a"].closed
    scene.leave(holder)


# --- who does not fit -------------------------------------------------------------------------------------------------


def test_a_model_that_exceeds_a_whole_budget_evicts_nobody():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2), model("b", 2), of_kind(model("big", 3, 2)))
    scene.use("a", "b")
    scene.given_up()
    error = error_of(scene.lease("big"))
    assert isinstance(error, ModelTooLargeError)
    assert (error.tier, error.needed_bytes, error.budget_bytes) == ("vram", 5, 4)
    assert not scene.loads
    scene.settle()
    assert scene.given_up() == []


def test_a_workspace_counts_toward_what_is_too_large():
    scene = Scene(Budgets(ram=20, vram=4), of_kind(model("a", 3, workspace_bytes=2)))
    error = error_of(scene.lease("a"))
    assert isinstance(error, ModelTooLargeError)
    assert error.needed_bytes == 5


def test_a_size_found_too_large_by_the_load_is_remembered_and_nothing_is_read_again():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 5, known=False))
    first = scene.lease("a")
    scene.settle()
    assert isinstance(error_of(first), ModelTooLargeError)
    assert isinstance(error_of(scene.lease("a")), ModelTooLargeError)
    assert not scene.loads
    assert scene.machine.books.parts == {}


def test_several_that_do_not_fit_together_are_refused_although_each_fits():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 3), model("b", 3))
    caller = scene.lease("a", "b")
    scene.settle()
    error = error_of(caller)
    assert isinstance(error, ModelTooLargeError)
    assert (error.name, error.needed_bytes) == ("a + b", 6)


def test_what_is_pinned_for_good_refuses_at_once_instead_of_waiting():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 3, pin=Tier.VRAM), model("b", 3))
    scene.use("a")
    error = error_of_settled(scene, scene.lease("b"))
    assert isinstance(error, BudgetExhaustedError)
    assert "pinned" in error.reason
    scene.pin("a", None)
    assert got(scene.get("b"))


def error_of_settled(scene, caller):
    scene.settle()
    return error_of(caller)


def test_with_reject_a_request_that_would_wait_is_refused_and_names_who_holds():
    scene = Scene(Budgets(ram=20, vram=4, wait_when_full=False), model("a", 3), model("b", 3))
    scene.get("a")
    error = error_of_settled(scene, scene.lease("b"))
    assert isinstance(error, BudgetExhaustedError)
    assert error.lease_holders == ("a",)
    assert scene.state("a") == "ready"


def test_a_request_that_cannot_be_met_now_takes_nothing_from_anybody():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 5))
    scene.use("a")
    holder = scene.get("b")
    scene.given_up()
    caller = scene.lease("c")
    scene.settle()
    assert scene.given_up() == []
    assert caller.answer is None
    scene.leave(holder)
    scene.settle()
    assert got(caller)
    assert scene.given_up() == [("trim", "a"), ("trim", "b")]


# --- first loads ------------------------------------------------------------------------------------------------------


def test_many_requests_for_one_cold_model_are_one_load_and_one_move_each_way():
    scene = Scene(Budgets(ram=4, vram=4), model("a", 2))
    callers = [scene.lease("a") for _ in range(50)]
    assert len(scene.loads) == 1
    scene.settle()
    assert all(got(caller) for caller in callers)
    assert [str(move.kind) for move in scene.moved] == ["stage", "promote"]


def test_loads_of_unknown_size_go_one_at_a_time_those_of_known_size_together():
    scene = Scene(Budgets(ram=20, vram=20), *(model(name, 2, known=name > "b") for name in "abcd"))
    for name in "abcd":
        scene.lease(name)
    assert sorted(scene.loads) == ["a", "c", "d"]
    scene.do(("load", "a"))
    assert sorted(scene.loads) == ["b", "c", "d"]


def test_a_loader_may_ask_for_another_model_of_unknown_size():
    scene = Scene(Budgets(ram=20, vram=20), model("a", 2, known=False), model("b", 2, known=False))
    outer = scene.lease("a")
    inner = scene.lease("b", inside="a")
    assert sorted(scene.loads) == ["a", "b"]
    scene.do(("load", "b"))
    while not got(inner):
        scene.do(("move", "b"))
    scene.settle()
    assert got(outer)


def test_loaders_that_wait_for_each_other_are_refused_with_the_cycle():
    scene = Scene(Budgets(ram=20, vram=20), *(model(name, 2) for name in "abc"))
    scene.lease("a")
    scene.lease("b", inside="a")
    scene.lease("c", inside="b")
    error = error_of(scene.lease("a", inside="c"))
    assert isinstance(error, LeaseCycleError)
    assert error.cycle == ("the loader of 'c' waits for a, whose loader waits for 'c'",)


def test_a_model_without_bytes_is_ready_once_it_is_loaded():
    spec_, _ = model("a", 2, known=False)
    scene = Scene(Budgets(ram=4, vram=4), (spec_, model("a", 1)[1].__class__((), 0, "Net")))
    assert got(scene.get("a"))
    assert scene.state("a") == "ready"


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_leased_model_never_moves_and_whoever_waits_is_served_when_it_is_returned():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    holder = scene.get("a")
    waiting = scene.lease("b")
    scene.settle()
    assert waiting.answer is None
    assert scene.state("a") == "ready"
    assert "a lease on 'a' to be returned" in scene.machine.waiting[waiting.ticket].why
    scene.leave(holder)
    scene.settle()
    assert got(waiting)
    assert scene.state("a") == "parked"


def test_leases_at_a_limit_are_had_in_the_order_they_were_asked_for():
    scene = Scene(Budgets(ram=4, vram=4), model("a", 2, limit=1))
    holder = scene.get("a")
    waiting = [scene.lease("a") for _ in range(4)]
    order = []
    for _ in range(4):
        scene.leave(holder)
        scene.settle()
        holder = next(caller for caller in waiting if got(caller) and caller not in order)
        order.append(holder)
        assert sum(got(caller) for caller in waiting) == len(order)
    assert order == waiting


def test_whoever_is_inside_already_gets_a_second_lease_at_a_limit_of_one():
    scene = Scene(Budgets(ram=4, vram=4), model("a", 2, limit=1))
    holder = scene.get("a")
    assert got(scene.lease("a", holder=scene.callers.index(holder)))


def test_two_callers_that_hold_what_the_other_wants_are_told_apart_by_age():
    scene = Scene(Budgets(ram=8, vram=2), *(model(name, 1) for name in "abcd"))
    x, y = scene.get("a"), scene.get("b")
    older = scene.lease("c", holder=scene.callers.index(x))
    scene.settle()
    assert older.answer is None
    younger = scene.lease("d", holder=scene.callers.index(y))
    scene.settle()
    error = error_of(younger)
    assert isinstance(error, LeaseCycleError)
    assert error.cycle == ("0 holds 'a' and waits for 'c'", "1 holds 'b' and waits for 'd'")
    assert older.answer is None
    scene.leave(y)
    scene.leave(x)
    scene.settle()
    assert got(older)


def test_a_caller_that_waits_for_room_it_holds_itself_is_refused():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    holder = scene.get("a")
    caller = scene.lease("b", holder=scene.callers.index(holder))
    scene.settle()
    assert isinstance(error_of(caller), LeaseCycleError)


def test_somebody_who_waits_for_a_caller_that_waits_for_nobody_is_not_refused():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 1), model("b", 1), model("c", 2))
    x, bystander = scene.get("a"), scene.get("b")
    waiting = scene.lease("c", holder=None)
    scene.settle()
    assert waiting.answer is None
    scene.leave(x)
    scene.leave(bystander)
    scene.settle()
    assert got(waiting)


def test_several_models_are_leased_together_or_not_at_all():
    scene = Scene(Budgets(ram=8, vram=4), model("a", 2), model("b", 2), model("c", 2))
    holder = scene.get("c")
    both = scene.lease("a", "b")
    scene.settle()
    assert both.answer is None
    assert scene.gates["a"].num_leases == scene.gates["b"].num_leases == 0
    scene.leave(holder)
    scene.settle()
    assert got(both)
    assert scene.gates["a"].num_leases == scene.gates["b"].num_leases == 1


def test_a_request_is_overtaken_only_so_often():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2), model("b", 2), model("big", 4))
    scene.use("a", "b")
    holder = scene.get("a")
    waiting = scene.lease("big")
    scene.settle()
    num_hits = 0
    while scene._is_open("a"):
        other = scene.hit("a")
        scene.leave(holder)
        holder, num_hits = other, num_hits + 1
        scene.settle()
        assert num_hits <= 2 * MAX_OVERTAKEN
    assert num_hits >= MAX_OVERTAKEN
    late = scene.lease("a")
    scene.settle()
    assert late.answer is None, "the model is kept for who has waited longest"
    scene.leave(holder)
    scene.settle()
    assert got(waiting)
    scene.leave(waiting)
    scene.settle()
    assert got(late)


def test_a_caller_who_leaves_changes_nothing_for_the_others():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    holder = scene.get("a")
    gone, stays = scene.lease("b"), scene.lease("b")
    scene.settle()
    scene.give_up(gone)
    scene.leave(holder)
    scene.settle()
    assert got(stays)
    assert gone.answer is None


def test_a_caller_who_leaves_mid_move_lets_it_land_and_gives_its_claims_back():
    scene = Scene(Budgets(ram=8, vram=4), model("a", 2), model("b", 4))
    scene.use("a")
    caller = scene.lease("b")
    scene.step()
    scene.step()
    scene.give_up(caller)
    scene.settle()
    books = scene.machine.books
    assert (books.vram.claimed_bytes, books.ram.claimed_bytes, books.vram.reserved_bytes) == (0, 0, 0)
    assert not scene.machine.waiting
    assert got(scene.get("b"))


# --- copies without leases --------------------------------------------------------------------------------------------


def test_a_prefetch_brings_a_copy_as_far_as_it_was_told():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2), model("b", 2))
    up, half = scene.ask(WantCopy("a", Tier.VRAM)), scene.ask(WantCopy("b", Tier.RAM))
    scene.settle()
    assert isinstance(up.answer, Done)
    assert isinstance(half.answer, Done)
    assert scene.states() == {"a": "ready", "b": "parked"}
    assert {move.reason for move in scene.moved} == {Reason.PREFETCH}


def test_a_prefetch_gives_way_to_a_later_lease():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a")
    scene.lease("c")
    prefetch = scene.ask(WantCopy("b", Tier.VRAM))
    lease = scene.lease("c")
    scene.settle()
    assert got(lease)
    assert not isinstance(prefetch.answer, Done)


def test_a_prefetch_is_given_up_when_leases_leave_no_room():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2), model("b", 2))
    scene.get("a")
    prefetch = scene.ask(WantCopy("b", Tier.VRAM))
    scene.settle()
    assert isinstance(error_of(prefetch), BudgetExhaustedError)


def test_a_prefetch_never_takes_a_pinned_copy():
    scene = Scene(Budgets(ram=8, vram=2), model("a", 2, pin=Tier.VRAM), model("b", 2))
    scene.use("a")
    prefetch = scene.ask(WantCopy("b", Tier.VRAM))
    scene.settle()
    assert isinstance(error_of(prefetch), BudgetExhaustedError)
    assert scene.state("a") == "ready"


# --- explicit moves ---------------------------------------------------------------------------------------------------


def test_parking_keeps_ram_and_evicting_keeps_nothing():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    scene.use("a")
    park = scene.ask(WantDown("a", Tier.RAM, None))
    scene.settle()
    assert (park.answer.freed_vram_bytes, scene.state("a")) == (2, "parked")
    evict = scene.ask(WantDown("a", Tier.DISK, None))
    scene.settle()
    assert (evict.answer.freed_ram_bytes, scene.state("a")) == (2, "cold")


def test_parking_what_is_down_already_is_done_at_once():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    assert isinstance(scene.ask(WantDown("a", Tier.RAM, None)).answer, Done)


def test_parking_waits_for_leases_and_keeps_new_ones_away():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    holder = scene.get("a")
    park = scene.ask(WantDown("a", Tier.RAM, None))
    late = scene.lease("a")
    scene.settle()
    assert park.answer is late.answer is None
    scene.leave(holder)
    scene.settle()
    assert isinstance(park.answer, Done)
    assert got(late)


def test_parking_a_model_the_caller_holds_is_refused():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    holder = scene.get("a")
    park = scene.ask(WantDown("a", Tier.RAM, scene.callers.index(holder)))
    assert isinstance(error_of(park), LeaseCycleError)


@pytest.mark.parametrize(("pin", "to"), [(Tier.VRAM, Tier.RAM), (Tier.VRAM, Tier.DISK), (Tier.RAM, Tier.DISK)])
def test_parking_below_a_pin_is_refused_and_names_the_pin(pin, to):
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, pin=pin))
    scene.use("a")
    error = error_of(scene.ask(WantDown("a", to, None)))
    assert isinstance(error, LeaseError)
    assert f"pinned to {pin}; unpin it first" in str(error)


def test_evicting_what_no_file_holds_needs_a_disk_budget():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, readable=False))
    scene.use("a")
    error = error_of(scene.ask(WantDown("a", Tier.DISK, None)))
    assert isinstance(error, BudgetExhaustedError)
    assert "budgets.disk" in str(error)
    assert scene.state("a") == "ready"


def test_parking_waits_until_the_room_it_takes_in_ram_is_free():
    scene = Scene(Budgets(ram=4, vram=6), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b", "c")
    assert scene.where("a") == (1, 1), "RAM gave up what VRAM holds"
    scene.ask(WantDown("a", Tier.RAM, None))
    assert [move.kind for move in scene.moves.values()] == [MoveKind.SHED]
    scene.settle()
    assert scene.state("a") == "parked"


def _parked_with_writes(scene: Scene) -> None:
    scene.ask(WantDown("a", Tier.RAM, None))
    scene.writes = 1
    scene.do(("find writes", "a"))
    scene.gates_answer()
    assert scene.state("a") == "parked"


def test_what_was_written_to_is_not_read_again_from_its_source():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    scene.use("a")
    _parked_with_writes(scene)
    error = error_of(scene.ask(WantDown("a", Tier.DISK, None)))
    assert "in no file to read them from again" in str(error)
    assert scene.state("a") == "parked"


def test_an_image_file_from_before_a_write_is_deleted():
    scene = Scene(Budgets(ram=8, vram=8, disk=8), model("a", 2, readable=False))
    scene.use("a")
    scene.ask(WantDown("a", Tier.DISK, None))
    scene.settle()
    scene.use("a")
    assert scene.machine.books.disk.resident_bytes == 2
    _parked_with_writes(scene)
    assert scene.machine.books.disk.resident_bytes == 0
    scene.ask(WantDown("a", Tier.DISK, None))
    assert scene.moves["a"].write_image


def test_evicting_what_no_file_holds_writes_one():
    scene = Scene(Budgets(ram=8, vram=8, disk=8), model("a", 2, readable=False))
    scene.use("a")
    scene.moved.clear()
    scene.ask(WantDown("a", Tier.DISK, None))
    scene.settle()
    assert [(move.kind, move.write_image) for move in scene.moved] == [(MoveKind.EVICT, True)]
    assert scene.machine.books.disk.resident_bytes == 2


def test_reserved_room_is_held_until_it_is_returned():
    scene = Scene(Budgets(ram=8, vram=4), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a", "b")
    scene.given_up()
    room = scene.ask(WantRoom(Tier.VRAM, 3, hold=True))
    scene.settle()
    assert isinstance(room.answer, Done)
    assert scene.given_up() == [("trim", "a"), ("trim", "b")]
    waiting = scene.lease("a")
    scene.settle()
    assert waiting.answer is None
    scene.return_room(room)
    assert got(waiting)


def test_freeing_makes_room_and_holds_nothing():
    scene = Scene(Budgets(ram=8, vram=4), model("a", 2), model("b", 2))
    scene.use("a", "b")
    room = scene.ask(WantRoom(Tier.VRAM, 2, hold=False))
    scene.settle()
    assert room.answer.freed_vram_bytes == 2
    assert scene.machine.books.vram.free_bytes == 2
    assert scene.machine.books.vram.claimed_bytes == 0


def test_more_room_than_the_budget_is_refused():
    scene = Scene(Budgets(ram=8, vram=4), model("a", 2))
    assert isinstance(error_of(scene.ask(WantRoom(Tier.VRAM, 5, hold=True))), ModelTooLargeError)


def test_a_lowered_budget_gives_up_what_is_idle_now_and_the_rest_when_leases_end():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a")
    holders = [scene.get("b"), scene.get("c")]
    resize = scene.ask(WantBudget(Tier.VRAM, 2))
    scene.settle()
    assert isinstance(resize.answer, Done)
    vram = scene.machine.books.vram
    assert (vram.budget_bytes, vram.target_bytes, vram.resident_bytes) == (4, 2, 4)
    assert scene.states() == {"a": "parked", "b": "ready", "c": "ready"}
    scene.leave(holders[0])
    scene.settle()
    assert (vram.budget_bytes, vram.resident_bytes) == (2, 2)
    assert scene.states() == {"a": "parked", "b": "parked", "c": "ready"}


def test_a_raised_budget_serves_who_waits_for_room():
    scene = Scene(Budgets(ram=20, vram=2), model("a", 2), model("b", 2))
    scene.get("a")
    waiting = scene.lease("b")
    scene.settle()
    assert waiting.answer is None
    scene.ask(WantBudget(Tier.VRAM, 4))
    scene.settle()
    assert got(waiting)


def test_an_unregistered_model_is_forgotten_with_everything_it_holds():
    scene = Scene(Budgets(ram=8, vram=8, disk=8), model("a", 2, readable=False), model("b", 2))
    scene.use("a")
    gone = scene.ask(WantGone("a", None))
    scene.settle()
    assert isinstance(gone.answer, Done)
    assert set(scene.machine.books.models) == {"b"}
    assert scene.machine.books.vram.resident_bytes == scene.machine.books.ram.resident_bytes == 0
    assert isinstance(error_of(scene.lease("a")), UnknownModelError)


def test_unregistering_waits_for_leases_and_nobody_gets_the_model_meanwhile():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    holder = scene.get("a")
    gone = scene.ask(WantGone("a", None))
    scene.settle()
    assert gone.answer is None
    assert scene.gates["a"].closed
    assert isinstance(error_of(scene.lease("a")), UnknownModelError)
    scene.leave(holder)
    scene.settle()
    assert isinstance(gone.answer, Done)


def test_unregistering_while_loading_refuses_who_waits_and_ends_with_the_load():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2))
    waiting = scene.lease("a")
    gone = scene.ask(WantGone("a", None))
    assert isinstance(error_of(waiting), UnknownModelError)
    assert gone.answer is None
    scene.settle()
    assert isinstance(gone.answer, Done)
    assert not scene.machine.books.models


def test_a_shared_part_stays_for_the_model_that_still_holds_it():
    common = part("common", 2)
    scene = Scene(
        Budgets(ram=8, vram=8),
        model("a", parts=(common, part("a", 1))),
        model("b", parts=(common, part("b", 1))),
    )
    scene.use("a", "b")
    assert scene.machine.books.vram.resident_bytes == 4
    scene.ask(WantGone("a", None))
    scene.settle()
    assert scene.machine.books.vram.resident_bytes == 3
    assert got(scene.get("b"))


def test_a_shared_part_goes_with_the_last_of_two_models_that_leave_at_the_same_time():
    common = part("common", 2)
    scene = Scene(Budgets(ram=8, vram=8), model("a", parts=(common, part("a", 1))), model("b", parts=(common,)))
    scene.use("a", "b")
    first = scene.ask(WantGone("a", None))
    while "a" not in scene.moves:
        assert scene.step()
    scene.ask(WantGone("b", None))
    scene.settle()
    assert isinstance(first.answer, Done)
    assert scene.machine.books.vram.resident_bytes == scene.machine.books.ram.resident_bytes == 0
    scene.machine.validate()


# --- idle -------------------------------------------------------------------------------------------------------------


def test_a_model_is_parked_once_it_was_idle_for_its_time():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, idle_s=10.0))
    scene.use("a")
    scene.at(2.5)
    scene.at(12.4)
    assert scene.state("a") == "ready"
    scene.at(12.5)
    scene.settle()
    assert scene.state("a") == "parked"
    assert scene.moved[-1].reason is Reason.IDLE


def test_a_use_starts_the_idle_time_again_and_a_lease_stops_it():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, idle_s=10.0))
    scene.use("a")
    scene.at(2.5)
    holder = scene.hit("a")
    scene.at(50.0)
    scene.settle()
    assert scene.state("a") == "ready"
    scene.leave(holder)
    scene.at(52.0)
    scene.at(59.9)
    assert scene.state("a") == "ready"
    scene.at(62.1)
    scene.settle()
    assert scene.state("a") == "parked"


def test_a_lease_held_for_longer_than_the_idle_time_keeps_its_model_in_use():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, idle_s=10.0))
    scene.use("a")
    holder = scene.hit("a")
    for now_s in (2.5, 12.5, 22.5):
        scene.at(now_s)
    scene.leave(holder)
    scene.at(23.5)
    scene.settle()
    assert scene.state("a") == "ready"


def test_a_pinned_model_is_never_idle():
    scene = Scene(Budgets(ram=8, vram=8), model("a", 2, idle_s=10.0, pin=Tier.VRAM))
    scene.use("a")
    for now_s in (3.0, 30.0, 300.0):
        scene.at(now_s)
    assert scene.state("a") == "ready"


def test_priorities_go_lowest_first_whatever_was_used_last():
    scene = Scene(
        Budgets(ram=20, vram=6),
        model("high", 2, priority=Priority.HIGH),
        model("low", 2, priority=Priority.LOW),
        model("plain", 2),
        model("x", 2),
        model("y", 2),
        model("z", 2),
    )
    scene.use("high", "plain", "low")
    scene.given_up()
    holders = []
    for name in "xyz":
        holders.append(scene.get(name))
    assert scene.given_up() == [("trim", "low"), ("trim", "plain"), ("trim", "high")]


def test_a_want_for_leases_keeps_what_it_names():
    # A later, smaller request may not take what an earlier request for several already counts on.
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2), model("b", 2), model("c", 2))
    scene.use("a")
    holder = scene.get("c")
    both = scene.lease("a", "b")
    late = scene.lease("c")
    scene.settle()
    assert got(late)
    scene.leave(late)
    scene.leave(holder)
    scene.settle()
    assert got(both)
    assert isinstance(both.wants[0], WantLease)


def test_what_an_earlier_request_counts_on_is_not_given_up_for_a_later_one():
    scene = Scene(Budgets(ram=20, vram=6), model("a", 2), model("b", 2), model("c", 2), model("d", 2), model("e", 2))
    scene.use("a", "b", "d")
    scene.given_up()
    both = scene.lease("a", "c")
    late = scene.lease("e")
    scene.settle()
    assert got(both)
    assert got(late)
    assert scene.given_up() == [("trim", "b"), ("trim", "d")]


def test_whoever_leaves_is_told_nothing_more_of_what_he_waited_for():
    scene = Scene(Budgets(ram=20, vram=2), model("a", 2), model("b", 2))
    holder = scene.get("a")
    waiting = scene.lease("b")
    scene.settle()
    assert scene.gates["a"].watched
    scene.give_up(waiting)
    assert not scene.gates["a"].watched
    scene.leave(holder)


def test_what_is_kept_for_a_later_ticket_is_free_to_an_earlier_one():
    scene = Scene(Budgets(ram=20, vram=4), model("a", 2), model("c", 4))
    holder = scene.get("a")
    waiting = scene.lease("c")
    scene.settle()
    while scene._is_open("a"):
        other = scene.hit("a")
        scene.leave(holder)
        holder = other
        scene.settle()
    assert scene.machine.bars == {"a": waiting.ticket}
    barred = {}
    for ticket in (waiting.ticket - 1, waiting.ticket, waiting.ticket + 1):
        each = scene.machine.waiting[waiting.ticket].copy()
        each.ticket = ticket
        barred[ticket - waiting.ticket] = scene.machine.is_barred("a", each)
    assert barred == {-1: False, 0: False, 1: True}
