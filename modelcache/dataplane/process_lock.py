"""Locks for what the whole process has once."""

from __future__ import annotations

import os
import threading


def process_lock() -> threading.Lock:
    """A lock for a module, to be made once with it; in a forked child it is free, whoever held it at the fork.

    The thread that held it does not exist there. What it guards must be fit to be used as that thread left it.
    """
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        # As `concurrent.futures` and `logging` do it with theirs.
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock
