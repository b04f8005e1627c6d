"""All hostile model folders, by name."""

from hostile import library_folders, part_folders, weight_folders  # each registers its own
from hostile.contents import CASES, LOADED, MARK, MARKER, Case, payload_module, pickled

__all__ = ["CASES", "LOADED", "MARK", "MARKER", "Case", "payload_module", "pickled"]

assert library_folders
assert part_folders
assert weight_folders
