"""What moved is kept, logged once, and told to whoever listens, in order and apart from everything else."""

from __future__ import annotations

import logging

import pytest

from modelcache.move import MoveKind, Reason
from modelcache.runtime.herald import TOPICS, Herald, log_move
from modelcache.stats import MoveEvent
from modelcache.testing import FakeClock, FakePool
from modelcache.tier import Tier


def event(seq=1, kind=MoveKind.PROMOTE, model="flux"):
    return MoveEvent(seq, 1.5, model, kind, Tier.RAM, Tier.VRAM, 300, 200, 0.125, Reason.REQUEST, model, 0.25, 10, 20)


@pytest.fixture
def herald():
    pool = FakePool()
    herald = Herald(pool, FakeClock(), keep=3)
    herald.pool = pool
    yield herald
    herald.stop()


def test_the_last_events_are_kept(herald):
    for seq in range(5):
        herald.publish(event(seq), ())
    assert [each.seq for each in herald.events()] == [2, 3, 4]


def test_subscribers_hear_what_they_asked_for_in_order(herald):
    heard = {topic: [] for topic in TOPICS}
    for topic in TOPICS:
        herald.on(topic, lambda each, topic=topic: heard[topic].append(each.seq))
    for seq, kind in enumerate((MoveKind.STAGE, MoveKind.PROMOTE, MoveKind.TRIM, MoveKind.PROMOTE)):
        herald.publish(event(seq, kind), ())
    herald.pool.settle()
    assert heard == {"move": [0, 1, 2, 3], "stage": [0], "promote": [1, 3], "trim": [2], "shed": [], "evict": []}


def test_a_subscription_can_end_twice_and_inside_itself(herald):
    heard = []

    def once(each):
        heard.append(each.seq)
        end()

    end = herald.on("move", once)
    for seq in range(3):
        herald.publish(event(seq), ())
    herald.pool.settle()
    end()
    assert heard == [0]


def test_one_that_raises_is_logged_and_the_next_hears_all_the_same(herald, caplog):
    heard = []
    herald.on("move", lambda each: 1 / 0)
    herald.on("move", heard.append)
    herald.publish(event(), ())
    herald.pool.settle()
    assert len(heard) == 1
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_one_that_raises_an_exit_or_an_interrupt_ends_nothing(herald, error, caplog):
    heard = []

    def leave(_):
        raise error

    herald.on("move", leave)
    herald.on("move", heard.append)
    for seq in range(2):
        herald.publish(event(seq), ())
    herald.pool.settle()
    assert [each.seq for each in heard] == [0, 1]
    assert "subscriber failed event=move" in caplog.text
    assert herald.ended() == ()


def test_an_unknown_topic_names_the_known_ones(herald):
    with pytest.raises(ValueError, match="'load'; choose one of move, stage, promote, trim, shed, evict"):
        herald.on("load", print)


def test_what_was_published_is_told_before_the_end():
    pool, heard = FakePool(), []
    herald = Herald(pool, FakeClock())
    herald.on("move", heard.append)
    herald.publish(event(), ())
    herald.stop()
    assert len(heard) == 1


def test_a_move_is_one_line_of_keys_and_values(caplog):
    with caplog.at_level(logging.INFO, "modelcache"):
        log_move(event(), ("sd15", "qwen"))
    (record,) = caplog.records
    assert record.getMessage() == (
        "promoted model=flux from=ram to=vram bytes=300 copied_bytes=200 seconds=0.125 reason=request for=flux "
        "evicted=[sd15, qwen] wait_s=0.250"
    )
