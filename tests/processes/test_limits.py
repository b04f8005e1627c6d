"""What a process runs into, in a process of its own: every scene in one child."""

from __future__ import annotations

import pytest
from processes import limit_scenes
from processes.children import run, verdicts

pytestmark = pytest.mark.timeout(90)

#: The scene, and what is asked for.
DEMANDS = [
    ("full_disk", "the error names path, need and free; nothing is left; the model stays"),
    ("no_descriptors", "loads and spills are refused in words, hits are not; both work when there are some again"),
    ("no_memory", "a load that the system has no memory for is refused; others are served"),
    ("a_file_truncated_while_it_is_read", "an error that names it, and no SIGBUS"),
    ("a_file_truncated_after_it_was_loaded", "what is held stays whole"),
    ("a_file_renamed_over_while_it_is_read", "never a mix of two files"),
    ("a_file_overwritten_in_place_while_it_is_read", "an error that says that it changed"),
    ("a_file_deleted", "copies work; a reload says what is missing"),
    ("forked_with_the_lock_held", "every call fails at once in the child; the parent is as it was"),
    ("forked_in_the_middle_of_what_a_process_has_once", "a new cache in the child waits for nobody who stayed behind"),
    ("a_data_loader_of_forked_workers", "workers may do without the cache, and are refused with it"),
    ("closed_stdout", "models come and go all the same"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What the child said of each scene."""
    folder = tmp_path_factory.mktemp("limits")
    return verdicts(run("processes.limit_scenes", "main", str(folder)))


@pytest.mark.parametrize(("scene", "demand"), DEMANDS, ids=[scene for scene, _ in DEMANDS])
def test_what_a_process_runs_into(told, scene, demand):
    assert told[scene] == "fine", f"{demand}:\n{told[scene]}"


def test_every_scene_is_played():
    assert [scene.__name__ for scene in limit_scenes.SCENES] == [scene for scene, _ in DEMANDS]
