"""Accelerate-dispatched models made whole, and put back."""
