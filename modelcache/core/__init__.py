"""Room 1: decide. Pure bookkeeping; no torch, threads, clock, files or logging."""
