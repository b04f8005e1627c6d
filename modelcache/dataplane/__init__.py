"""Room 3: do. The only torch: bytes, blocks, devices; no budgets, no leases."""
