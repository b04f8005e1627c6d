"""Room 2: drive. Threads and time; no torch, no decisions about bytes or recency."""
