"""The rules of a Hypothesis state machine over the public API: by threads, and with tasks beside them."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stateful.play import DOWN, Play, injected
from stateful.reference import INJECTED, SHARED, Held, Known
from stateful.stage import DISK, RAM, VRAM, Actor, Stage

from modelcache.errors import DeviceMemoryError, DevicePoisonedError
from modelcache.spec import OnWrite
from modelcache.tier import Tier

NAMES = st.sampled_from("abcdef")
#: Sizes around what a cache's figures make special, and a few that leave room for several.
SIZES = st.sampled_from([100, 200, 300, 400, 511, 512, 513, 0, 1, VRAM - 1, VRAM, VRAM + 1])
SMALL = st.sampled_from([100, 200, 256, 300, 400])
ROOMS = SIZES.filter(bool)
TIMEOUTS = st.sampled_from([None, None, None, 0.0, 1.0, 5.0, 1e300, float("inf")])
TIERS = st.sampled_from([Tier.VRAM, Tier.RAM])
INDEX = st.integers(0, 5)
STEPS = st.sampled_from(["load", "stage", "promote", "trim", "shed", "evict"])
PARTS = st.one_of(
    st.lists(SIZES, min_size=1, max_size=3).map(lambda sizes: {"": tuple(sizes)}),
    st.sampled_from([("shared-x",), ("shared-x", "shared-y"), ("shared-y", "own")]).map(
        lambda labels: {label: SHARED.get(label, (200, 56)) for label in labels}
    ),
)


#: What a model may be registered with.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "sizes": PARTS,
    "workspace": st.sampled_from([0, 0, 0, 1, 100, VRAM]),
    "reload": st.sampled_from([True, True, True, False]),
    "on_write": st.sampled_from(list(OnWrite)),
    "concurrency": st.sampled_from([0, 0, 0, 1, 2]),
    "priority": st.sampled_from(["normal", "normal", "normal", "low", "high"]),
    "pin": st.sampled_from([None] * 8 + [Tier.VRAM, Tier.RAM]),
    "idle": st.sampled_from([None, None, None, "4s"]),
    "sized": st.sampled_from([True, True, False]),
    "fails": st.sampled_from([0, 0, 0, 0, 1, 4]),
}
#: Most are ordinary, so that several fit.
MODELS = st.one_of(
    st.builds(lambda *sizes: {"sizes": {"": sizes}}, SIZES),
    st.builds(lambda *sizes: {"sizes": {"": sizes}}, SMALL, SMALL),
    st.fixed_dictionaries({}, optional=OPTIONS).map(lambda options: {"sizes": {"": (300, 211)}, **options}),
    st.fixed_dictionaries(OPTIONS),
)


class CacheByThreads(RuleBasedStateMachine):
    """Threads ask, wait and hold. `stage` is made by the test; an example that fails leaves it unusable."""

    stage: ClassVar[Stage]
    num_steps: ClassVar[int] = 0

    @initialize(
        fleet=st.tuples(MODELS, MODELS, MODELS, MODELS, MODELS),
        top=st.sampled_from([Tier.VRAM, Tier.VRAM, Tier.VRAM, Tier.RAM]),
        disk=st.sampled_from([DISK, DISK, 600, 0]),
        reject=st.sampled_from([False, False, False, True]),
        max_waiters=st.sampled_from([512, 512, 512, 2]),
        check_after_s=st.sampled_from([None, None, 3.0]),
    )
    def open(self, fleet: tuple[dict[str, Any], ...], **options: Any) -> None:
        if self.stage.is_spoiled:
            self.stage.give_up()
            type(self).stage = Stage()
        self.stage.is_spoiled = True
        self.play = Play(self.stage, **options)
        self.reference = self.play.reference
        self.fleet = fleet
        self._register_fleet()

    def _register_fleet(self) -> None:
        for name, options in zip("abcde", self.fleet):
            self._register(name, **options)

    @invariant()
    def everything_holds(self) -> None:
        type(self).num_steps += 1
        self.play.look()

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        self.play.finish()
        for name, known in tuple(self.reference.registered.items()):
            self._ask("get", (name,), partial(self.play.cache.get, name))
            self.play.look()
            assert known.model is not None or not self.reference.must_be_served(known, self.play.now_s)
            self.play.finish()
        self.play.close()
        self.stage.is_spoiled = False

    # --- models -------------------------------------------------------------------------------------------------------

    @rule(name=NAMES, options=MODELS)
    def register(self, name: str, options: dict[str, Any]) -> None:
        if name not in self.reference.registered:
            self._register(name, **options)

    def _register(self, name: str, *, sizes: dict[str, tuple[int, ...]], **options: Any) -> None:
        own = {label if label in SHARED or not label else f"{name}-{label}": size for label, size in sizes.items()}
        known = Known(name, own, **options)
        if any(known.sizes):
            # Parts that several models hold are as whoever brought them first said, so all say the same.
            known.reload, known.on_write = True, OnWrite.WRITEBACK
        try:
            self.play.register(known)
        except ValueError:
            assert name in self.reference.leaving
            return
        assert name not in self.reference.leaving

    @rule(actor=INDEX, name=NAMES)
    def unregister(self, actor: int, name: str) -> None:
        if name not in self.reference.registered or not self._free:
            return
        self.reference.unregister(name)
        self.play.ask(self._actor(actor), "gone", (), partial(self.play.cache.unregister, name))

    @rule(name=NAMES, tier=st.sampled_from([Tier.VRAM, Tier.RAM, None]))
    def pin(self, name: str, tier: Tier | None) -> None:
        known = self.reference.registered.get(name)
        if known is not None:
            known.pin = tier
            self.play.cache.unpin(name) if tier is None else self.play.cache.pin(name, tier)

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def _free(self) -> list[Actor]:
        return [actor for actor in self.stage.actors if actor.is_free]

    def _actor(self, index: int) -> Actor:
        return self._free[index % len(self._free)]

    def _ask(self, kind: str, names: tuple[str, ...], act: Any, *, actor: int = 0, **facts: Any) -> None:
        self.play.ask(self._actor(actor), kind, names, act, **facts)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, name=NAMES, timeout=TIMEOUTS)
    def get(self, actor: int, name: str, timeout: float | None) -> None:
        self._ask("get", (name,), partial(self.play.cache.get, name, timeout=timeout), actor=actor, timeout=timeout)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, names=st.lists(NAMES, min_size=1, max_size=3, unique=True), timeout=TIMEOUTS)
    def lease(self, actor: int, names: list[str], timeout: float | None) -> None:
        wanted = tuple(names)
        self._ask("lease", wanted, self.play.lease(wanted, timeout), actor=actor, timeout=timeout)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, name=NAMES, timeout=TIMEOUTS)
    def lease_one(self, actor: int, name: str, timeout: float | None) -> None:
        self._ask("lease", (name,), self.play.lease((name,), timeout), actor=actor, timeout=timeout)

    @precondition(lambda self: self._free and self._holding("handle"))
    @rule(actor=INDEX, at=INDEX, enter=st.booleans())
    def use(self, actor: int, at: int, enter: bool) -> None:
        """Call a handle, or enter it for a while: its first use, or one more."""
        handles = self._holding("handle")
        held = handles[at % len(handles)]
        takes_over = held.num_leases(self.play.now_s) > 0
        (known,) = held.known
        handle = held.thing
        facts = {"of": known, "takes_over": takes_over, "handle": handle}
        if enter:
            self._ask("enter", (known.name,), handle.__enter__, actor=actor, **facts)
        else:
            self._ask("call", (known.name,), handle, actor=actor, **facts)
        held.first_until_s = None

    @rule(name=NAMES, tier=TIERS)
    def prefetch(self, name: str, tier: Tier) -> None:
        self.play.prefetch(name, tier)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, name=NAMES, to=st.sampled_from([Tier.RAM, Tier.DISK]), timeout=TIMEOUTS)
    def park_or_evict(self, actor: int, name: str, to: Tier, timeout: float | None) -> None:
        cache = self.play.cache
        act = partial(cache.park, name) if to is Tier.RAM else partial(cache.evict, name, to=to)
        self._ask("down", (name,), partial(act, timeout=timeout), actor=actor, timeout=timeout)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, tier=TIERS, size=ROOMS, timeout=TIMEOUTS)
    def free(self, actor: int, tier: Tier, size: int, timeout: float | None) -> None:
        act = partial(self.play.cache.free, **{tier.value: size}, timeout=timeout)
        self._room("free", tier, size, act, actor=actor, timeout=timeout)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, tier=TIERS, size=ROOMS, timeout=TIMEOUTS)
    def reserve(self, actor: int, tier: Tier, size: int, timeout: float | None) -> None:
        block = self.play.cache.reserve(**{tier.value: size}, timeout=timeout)
        self._room("room", tier, size, block.__enter__, actor=actor, timeout=timeout, block=block)

    def _room(self, kind: str, tier: Tier, size: int, act: Any, **facts: Any) -> None:
        if tier is Tier.VRAM and self.reference.top is Tier.RAM:
            return
        self._ask(kind, (), act, sizes={tier: size}, **facts)

    @precondition(lambda self: self._free)
    @rule(actor=INDEX, tier=TIERS, share=st.sampled_from([0.001, 0.25, 0.5, 0.75, 1.0, 1.0]))
    def resize(self, actor: int, tier: Tier, share: float) -> None:
        if tier is Tier.VRAM and self.reference.top is Tier.RAM:
            return
        size = int((VRAM if tier is Tier.VRAM else RAM) * share)
        self._ask("resize", (), partial(self.play.cache.resize, **{tier.value: size}), actor=actor)
        self.reference.retarget(tier, size)

    # --- giving back, writing -----------------------------------------------------------------------------------------

    def _holding(self, *kinds: str) -> list[Held]:
        return [held for held in self.reference.held if held.kind in kinds]

    @property
    def _returnable(self) -> list[Held]:
        return [held for held in self.reference.held if self.play.can_give_back(held)]

    def _give_back(self, at: int) -> None:
        held = self._returnable
        self.play.give_back(held[at % len(held)])

    @precondition(lambda self: self._returnable)
    @rule(at=INDEX)
    def give_back(self, at: int) -> None:
        self._give_back(at)

    @precondition(lambda self: len(self._returnable) > 1)
    @rule(at=INDEX)
    def give_back_one_of_several(self, at: int) -> None:
        self._give_back(at)

    @precondition(lambda self: self._holding("lease", "handle"))
    @rule(at=INDEX)
    def drop(self, at: int) -> None:
        held = self._holding("lease", "handle")
        self.play.drop(held[at % len(held)])

    @precondition(lambda self: self._holding("lease", "entered", "task"))
    @rule(at=INDEX, model=INDEX, part=INDEX, segment=INDEX, data=st.binary(min_size=1, max_size=3))
    def write(self, at: int, model: int, part: int, segment: int, data: bytes) -> None:
        held = self._holding("lease", "entered", "task")
        models = held[at % len(held)].models
        self.play.write(models[model % len(models)], part, segment, data)

    # --- the world ----------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 4.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.clock.advance(seconds)

    @rule(step=STEPS, name=st.one_of(st.none(), NAMES))
    def a_step_will_stand_still(self, step: str, name: str | None) -> None:
        if len(self.stage.holds) < 4:
            self.stage.hold(step, name)

    @precondition(lambda self: self.stage.holds)
    @rule(at=INDEX)
    def a_step_goes_on(self, at: int) -> None:
        self.stage.release(at % len(self.stage.holds))

    @precondition(lambda self: self.stage.holds)
    @rule()
    def every_step_goes_on(self) -> None:
        self.stage.release()

    @rule(step=STEPS, name=st.one_of(st.none(), NAMES))
    def a_step_will_fail(self, step: str, name: str | None) -> None:
        self.reference.past.faults = True
        self.reference.past.kept |= step in DOWN
        self.play.mover.fail(step, injected(step), name)

    @rule(nth=st.integers(1, 2))
    def the_device_will_be_full(self, nth: int) -> None:
        self.reference.past.faults = True
        self.play.mover.fail("promote", DeviceMemoryError(INJECTED, "fake:0", 1, 0), nth=nth)

    @precondition(lambda self: self.reference.moment > 12)
    @rule()
    def the_device_will_be_lost(self) -> None:
        if self.reference.top is Tier.VRAM:
            self.reference.past.faults = self.reference.past.poison = True
            self.play.mover.fail("promote", DevicePoisonedError("fake:0", INJECTED))

    @precondition(lambda self: self.reference.moment > 8)
    @rule(late_s=st.sampled_from([0.0, 0.0, 5.0]), top=st.sampled_from([Tier.VRAM, Tier.RAM]))
    def close_and_reopen(self, late_s: float, top: Tier) -> None:
        self.play.close(late_s=late_s)
        self.play = Play(self.stage, top=top, disk=DISK, reject=False, max_waiters=512)
        self.reference = self.play.reference
        self._register_fleet()


class CacheByTasks(CacheByThreads):
    """Tasks of one event loop ask beside the threads, and may be cancelled at any moment."""

    @rule(name=NAMES, timeout=TIMEOUTS)
    def aget(self, name: str, timeout: float | None) -> None:
        self.play.start("aget", (name,), partial(self.play.aget, name, timeout), timeout=timeout)

    @rule(names=st.lists(NAMES, min_size=1, max_size=2), timeout=TIMEOUTS)
    def async_with(self, names: list[str], timeout: float | None) -> None:
        wanted = tuple(names)
        # Each model has a time of its own: the first may have taken all but nothing of it.
        facts = {"timeout": timeout} if len(wanted) == 1 else {"later": timeout}
        self.play.start("aenter", wanted, partial(self.play.aenter, wanted, timeout), **facts)

    @rule(name=NAMES)
    def aprefetch(self, name: str) -> None:
        self.play.start("copy", (name,), partial(self.play.aprefetch, name))

    @property
    def _cancellable(self) -> list[Any]:
        return [asked for asked in self.reference.open if asked in self.stage.loop.tasks or "future" in asked.facts]

    @precondition(lambda self: self._cancellable)
    @rule(at=INDEX)
    def cancel(self, at: int) -> None:
        self.play.cancel(self._cancellable[at % len(self._cancellable)])

    @precondition(lambda self: self._cancellable)
    @rule(at=INDEX)
    def time_passes_and_cancel(self, at: int) -> None:
        """Both at once, unsettled: whichever comes first, the answer is given back."""
        asked = self._cancellable[at % len(self._cancellable)]
        self.stage.clock.advance(1.0)
        self.play.cancel(asked)

    @precondition(lambda self: self._cancellable and self._returnable)
    @rule(at=INDEX, which=INDEX)
    def give_back_and_cancel(self, at: int, which: int) -> None:
        """Whoever waits for what is returned is cancelled before it runs again."""
        asked = self._cancellable[at % len(self._cancellable)]
        self._give_back(which)
        self.stage.pool.settle()
        self.play.cancel(asked)

    @precondition(lambda self: self._holding("task"))
    @rule(at=INDEX)
    def cancel_a_holder(self, at: int) -> None:
        held = self._holding("task")
        which = held[at % len(held)]
        self.reference.held.remove(which)
        which.thing.cancel()
