"""Double-entry bytes: any sequence of legal steps keeps every byte accounted for exactly once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelcache.core.ledger import Account, Room
from modelcache.tier import Tier

SIZES = st.one_of(st.integers(0, 8), st.sampled_from([511, 512, 513, 1 << 40]))


class LedgerMachine(RuleBasedStateMachine):
    """Bytes in five places, as lists; the account must agree with their sums whatever happens."""

    @initialize(budget=st.integers(0, 2048))
    def start(self, budget):
        self.account = Account(budget)
        self.target = budget
        self.claims, self.moving, self.resident, self.leaving = [], [], [], []

    def pick(self, data, place):
        return place.pop(data.draw(st.integers(0, len(place) - 1)))

    @rule(size=SIZES)
    def claim(self, size):
        room = self.account.free_bytes + self.account.draining_bytes - self.account.claimed_bytes
        if size <= room:
            self.account.claim(size)
            self.claims.append(size)
        else:
            with pytest.raises(AssertionError):
                self.account.claim(size)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def reserve(self, data):
        size = self.pick(data, self.claims)
        if size <= self.account.free_bytes:
            self.account.reserve(size)
            self.moving.append(size)
        else:
            with pytest.raises(AssertionError):
                self.account.reserve(size)
            self.claims.append(size)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def unclaim(self, data):
        self.account.unclaim(self.pick(data, self.claims))

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), lands=st.booleans())
    def end_of_a_move(self, data, lands):
        size = self.pick(data, self.moving)
        if lands:
            self.account.commit(size)
            self.resident.append(size)
        else:
            self.account.cancel(size)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def drain(self, data):
        size = self.pick(data, self.resident)
        self.account.drain(size)
        self.leaving.append(size)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def drained(self, data):
        self.account.drained(self.pick(data, self.leaving))

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def undrain(self, data):
        size = self.pick(data, self.leaving)
        spare = self.account.free_bytes + self.account.draining_bytes - size - self.account.claimed_bytes
        if spare < 0:
            self.leaving.append(size)
            return
        self.account.undrain(size)
        self.resident.append(size)

    @rule(budget=st.integers(0, 2048))
    def retarget(self, budget):
        before = self.account.budget_bytes
        self.account.retarget(budget)
        self.target = budget
        assert budget <= self.account.budget_bytes <= max(before, budget)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "account"):
            return
        account = self.account
        account.validate()
        assert account.claimed_bytes == sum(self.claims)
        assert account.reserved_bytes == sum(self.moving)
        assert account.resident_bytes == sum(self.resident)
        assert account.draining_bytes == sum(self.leaving)
        held = sum(self.moving) + sum(self.resident) + sum(self.leaving)
        assert account.free_bytes == account.budget_bytes - held
        assert account.target_bytes == self.target
        assert account.deficit_bytes >= 0

    @invariant()
    def a_lowered_budget_binds_as_soon_as_it_can(self):
        if hasattr(self, "account") and not (self.claims or self.moving or self.resident or self.leaving):
            assert self.account.budget_bytes == self.target


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_what_is_not_there_is_neither_committed_nor_drained():
    account = Account(10)
    for step in (account.reserve, account.commit, account.cancel, account.drain, account.drained, account.undrain):
        with pytest.raises(AssertionError):
            step(1)
    for step in (account.claim, account.unclaim, account.drain, account.retarget):
        with pytest.raises(AssertionError):
            step(-1)


def test_a_lowered_budget_follows_as_bytes_are_given_up():
    account = Account(10)
    account.claim(8)
    account.reserve(8)
    account.commit(8)
    account.retarget(4)
    assert (account.budget_bytes, account.deficit_bytes, account.available_bytes) == (8, 4, -4)
    account.drain(5)
    assert account.budget_bytes == 8
    account.drained(5)
    assert (account.budget_bytes, account.deficit_bytes, account.free_bytes) == (4, 0, 1)


def test_room_adds_up_by_tier_and_is_false_when_empty():
    room = Room(1, 2, 3) + Room(vram=10)
    assert [room.of(tier) for tier in (Tier.VRAM, Tier.RAM, Tier.DISK)] == [11, 2, 3]
    assert room
    assert not Room()


def test_a_budget_lowered_for_a_while_returns_to_what_was_configured_and_never_exceeds_it():
    account = Account(10)
    account.retarget(4, "memory is short")
    assert (account.target_bytes, account.configured_bytes, account.pressure) == (4, 10, "memory is short")
    account.retarget(7, "less short")
    assert (account.target_bytes, account.pressure) == (7, "less short")
    account.retarget(99, "not short any more")
    assert (account.target_bytes, account.budget_bytes, account.pressure) == (10, 10, "")
    assert account.pressure_on(Tier.RAM) == ""


def test_a_budget_that_is_set_is_the_one_that_is_lowered_from():
    account = Account(10)
    account.retarget(4, "memory is short")
    account.retarget(6)
    assert (account.target_bytes, account.configured_bytes, account.pressure) == (6, 6, "")
    account.retarget(2, "short again")
    assert account.pressure_on(Tier.RAM) == "budgets.ram is lowered from 6 B to 2 B for now: short again"
    assert account.copy() == account
    account.validate()
