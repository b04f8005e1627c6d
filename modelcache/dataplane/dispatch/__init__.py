"""Dispatched models that run in the cache."""
