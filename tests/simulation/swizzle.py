"""Completions in another order than beginnings: some are held back together, and let go one by one, shuffled."""

from __future__ import annotations

from collections import Counter

from simulation.scheduler import Scheduler

PATIENCE_S = 4.0


class Swizzle:
    """Does nothing until its task runs.

    Args:
        scheduler: Decides.
        marks: Counts what was reached.
    """

    def __init__(self, scheduler: Scheduler, marks: Counter[str]) -> None:
        self._scheduler, self._marks = scheduler, marks
        self._is_clogged = False
        self._held: list[str] = []

    def stand(self, what: str) -> None:
        """Something is about to complete."""
        if not self._is_clogged:
            return
        scheduler = self._scheduler
        # By number of its own: two of one name may stand here.
        ticket = f"{what} ({scheduler.num_switches})"
        scheduler.note(f"{ticket} is held back")
        self._held.append(ticket)
        scheduler.wait(lambda: ticket not in self._held, "is held back")

    def run(self) -> None:
        """A few rounds, on a task of its own."""
        scheduler, draw = self._scheduler, self._scheduler.random
        for _ in range(draw.randint(1, 3)):
            scheduler.sleep(draw.uniform(0.0, 4.0), "will hold completions back")
            self._is_clogged = True
            num_wanted = draw.randint(2, 4)
            until_s = scheduler.now_s + PATIENCE_S
            scheduler.wait(lambda n=num_wanted: len(self._held) >= n, "holds completions back", until_s)
            self._is_clogged = False
            order = draw.sample(self._held, len(self._held))
            self._marks["completions swizzled"] += order != self._held
            for ticket in order:
                scheduler.note(f"lets {ticket} complete")
                self._held.remove(ticket)
                scheduler.sleep(draw.choice((0.0, 0.01)), "lets complete")
