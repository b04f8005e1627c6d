"""What a process runs into, in a process of its own: every scene in one child, and each a row."""

from __future__ import annotations

import pytest
from processes import limit_scenes
from processes.children import run, verdicts

pytestmark = pytest.mark.timeout(90)

#: The scene, the row of the fault matrix that it shows, and what that row asks for.
ROWS = [
    ("full_disk", "F25", "the error names path, need and free; nothing is left; the model stays"),
    ("no_descriptors", "", "loads and spills are refused in words, hits are not; both work when there are some again"),
    ("no_memory", "F12 by the system", "a load that the system has no memory for is refused; others are served"),
    ("a_file_truncated_while_it_is_read", "F27", "an error that names it, and no SIGBUS"),
    ("a_file_truncated_after_it_was_loaded", "F27 later", "what is held stays whole"),
    ("a_file_renamed_over_while_it_is_read", "F28", "never a mix of two files"),
    ("a_file_overwritten_in_place_while_it_is_read", "F29", "an error that says that it changed"),
    ("a_file_deleted", "F30", "copies work; a reload says what is missing"),
    ("forked_with_the_lock_held", "F51", "every call fails at once in the child; the parent is as it was"),
    ("a_data_loader_of_forked_workers", "F51 in workers", "workers may do without the cache, and are refused with it"),
    ("closed_stdout", "F65", "models come and go all the same"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What the child said of each scene."""
    folder = tmp_path_factory.mktemp("limits")
    return verdicts(run("processes.limit_scenes", "main", str(folder)))


@pytest.mark.parametrize(("scene", "row", "demand"), ROWS, ids=[scene for scene, _, _ in ROWS])
def test_what_a_process_runs_into(told, figure, scene, row, demand):
    assert told[scene] == "fine", f"{demand}:\n{told[scene]}"
    if row:
        figure("fault rows", row, 1)


def test_every_scene_is_a_row():
    assert [scene.__name__ for scene in limit_scenes.SCENES] == [scene for scene, _, _ in ROWS]
