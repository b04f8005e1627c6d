"""One thread that plays many: a seed decides who runs next, and time passes only when nobody can run.

The strategies are uniform random choice, and PCT (Burckhardt et al., "A randomized scheduler with probabilistic
guarantees of finding bugs", 2010): random priorities with a few points at which the running task falls to the lowest.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from simulation.strands import GreenletStrand, Strand

#: More switches than this in one schedule, and it is taken for a livelock.
MAX_SWITCHES = 100_000
#: Where PCT's priorities change: somewhere within this many switches.
PCT_SWITCHES = 600
PCT_CHANGES = 3


class Livelock(AssertionError):
    """Everybody runs and nothing ends."""


class Task:
    """A thread of the simulation."""

    def __init__(
        self, name: str, run: Callable[[], None], priority: float, strand: Callable[[Callable[[], None]], Strand]
    ) -> None:
        self.name = name
        self.priority = priority
        self.ready: Callable[[], bool] | None = None
        self.until_s: float | None = None
        self.why = "start"
        self.error: BaseException | None = None
        self._run: Callable[[], None] | None = run
        self.strand = strand(self._body)

    def _body(self) -> None:
        # What it ran is let go at its end, as a thread does: memory may hang on it.
        run, self._run = self._run, None
        assert run is not None
        try:
            run()
        except BaseException as error:
            self.error = error

    @property
    def is_over(self) -> bool:
        return self.strand.is_over


class Scheduler:
    """Runs tasks one at a time; they hand over only where they say so.

    Args:
        seed: Decides everything.
        strand: What tasks run on.
    """

    def __init__(self, seed: int, strand: Callable[[Callable[[], None]], Strand] = GreenletStrand) -> None:
        self.seed = seed
        self._strand = strand
        self.random = random.Random(seed)
        self.strategy = self.random.choice(("random", "pct"))
        changes = self.random.sample(range(PCT_SWITCHES), PCT_CHANGES)
        self._changes = frozenset(changes) if self.strategy == "pct" else frozenset()
        self.now_s = 0.0
        self.num_switches = 0
        self.max_switches = MAX_SWITCHES
        self.tasks: list[Task] = []
        self.trace: deque[str] = deque(maxlen=30)
        #: Called after every switch; raises what an oracle has found.
        self.watch: Callable[[], None] = lambda: None
        self._current: Task | None = None
        self._next: Task | None = None
        self._failure: BaseException | None = None

    @property
    def current(self) -> Task | None:
        """The task that runs now; `None` outside every task, in a finalizer between two of them too."""
        task = self._current
        return task if task is not None and task.strand.is_here else None

    def note(self, what: str) -> None:
        """Add to the trace."""
        who = self._current.name if self._current is not None else "-"
        self.trace.append(f"{self.now_s:7.2f} s  {who}: {what}")

    def spawn(self, name: str, run: Callable[[], None]) -> Task:
        task = Task(name, run, self.random.random(), self._strand)
        self.tasks.append(task)
        return task

    def switch(self, why: str) -> None:
        """Let others run, perhaps. Does nothing outside every task."""
        task = self.current
        if task is not None:
            task.ready, task.until_s, task.why = None, None, why
            self._pause(task)

    def wait(self, ready: Callable[[], bool], why: str, until_s: float | None = None) -> bool:
        """Stand still until `ready()`; whether it was, and not the time that came first."""
        task = self.current
        assert task is not None, f"nobody can wait outside of a task: {why}"
        task.ready, task.until_s, task.why = ready, until_s, why
        self._pause(task)
        return ready()

    def sleep(self, seconds: float, why: str) -> None:
        self.wait(lambda: False, why, self.now_s + seconds)

    def step_back(self, why: str) -> None:
        """Let everybody else run first."""
        task = self.current
        if task is not None:
            task.priority = min((each.priority for each in self.tasks), default=0.0) - 1.0
            self.switch(why)

    def run(self) -> None:
        """Until nobody can run any more, however much time passes."""
        self._next = self._choose()
        while (task := self._next) is not None:
            self._current = task
            try:
                task.strand.resume()
            finally:
                self._current = None
            if task.error is not None:
                raise task.error
            if task.is_over:
                self.tasks.remove(task)
                self._decide()
            if self._failure is not None:
                raise self._failure

    def _pause(self, task: Task) -> None:
        """On the strand of the task: hand over, unless it is the one that goes on."""
        self._current = None
        self._decide()
        if self._next is not task:
            task.strand.hand_over()
        self._current = task

    def _decide(self) -> None:
        """What was found wrong is the hub's to raise, whoever finds it."""
        try:
            self.watch()
            self._next = self._choose()
        except BaseException as error:
            self._failure, self._next = error, None

    def _choose(self) -> Task | None:
        """Who runs next; `None` when nobody can, ever."""
        # Called for every switch, for a dozen tasks: written to be quick.
        while True:
            now_s, able = self.now_s, []
            for task in self.tasks:
                ready = task.ready
                if ready is None or ready() or (task.until_s is not None and task.until_s <= now_s):
                    able.append(task)
            if able:
                return self._chosen(able)
            times = [task.until_s for task in self.tasks if task.until_s is not None]
            if not times:
                return None
            self.now_s = max(now_s, min(times))

    def _chosen(self, able: list[Task]) -> Task:
        self.num_switches += 1
        if self.num_switches > self.max_switches:
            names = ", ".join(task.name for task in able)
            raise Livelock(f"more than {self.max_switches} switches; able to run: {names}")
        if self.strategy == "random":
            task = able[int(self.random.random() * len(able))]
        else:
            task = max(able, key=lambda each: each.priority)
            if self.num_switches in self._changes:
                task.priority = min(each.priority for each in self.tasks) - 1.0
        task.ready, task.until_s = None, None
        return task
