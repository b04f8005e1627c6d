import pytest

from modelcache.cli.planning import SEGMENT_BYTES, PlannedModel, Switch, TopTier, switches, together

GIB = 1024**3


def model(name, gib, workspace=0, pin=None):
    size = None if gib is None else gib * GIB
    return PlannedModel(name, size, "size", workspace * GIB, pin)


def test_a_model_larger_than_the_budget_is_refused_and_gives_nothing_up():
    found = switches([model("a", 4), model("huge", 30), model("b", 4)], 10 * GIB)
    assert found[1] == Switch("huge", 30 * GIB, refused="larger than the whole budget")
    assert [switch.gives_up for switch in found] == [(), (), ()]


def test_a_model_that_pins_leave_no_room_for_names_them():
    [_, _, blocked] = switches([model("p", 4, pin="vram"), model("q", 3, pin="vram"), model("b", 6)], 10 * GIB)
    assert blocked.refused == "does not fit beside what is pinned: p, q"


def test_a_workspace_counts_against_the_budget():
    [switch] = switches([model("a", 8, workspace=3)], 10 * GIB)
    assert switch.refused == "larger than the whole budget"


def test_what_fits_together_moves_nothing():
    assert all(switch.incoming_bytes == 0 for switch in switches([model("a", 4), model("b", 5)], 10 * GIB))


def test_the_least_recently_used_gives_up_first_and_only_what_is_needed():
    found = switches([model("a", 4), model("b", 4), model("c", 4)], 10 * GIB)
    assert [(switch.to, switch.gives_up, switch.incoming_bytes) for switch in found] == [
        ("a", (("b", 2 * GIB),), 2 * GIB),
        ("b", (("c", 2 * GIB),), 2 * GIB),
        ("c", (("a", 2 * GIB),), 2 * GIB),
    ]


def test_whole_segments_are_given_up():
    found = switches([PlannedModel("a", 6 * GIB, "size"), PlannedModel("b", 4 * GIB + 1, "size")], 10 * GIB)
    assert found[1].gives_up == (("a", SEGMENT_BYTES),)


def test_several_models_give_up_when_one_is_not_enough():
    found = switches([model("a", 2), model("b", 2), model("c", 9)], 10 * GIB)
    assert found[2].gives_up == (("a", 2 * GIB), ("b", GIB))


def test_a_pinned_model_never_gives_up():
    found = switches([model("p", 3, pin="vram"), model("a", 5), model("b", 5)], 10 * GIB)
    assert [name for switch in found for name, _ in switch.gives_up] == ["b", "a"]


def test_a_model_of_unknown_size_takes_no_part():
    models = [model("a", 4), model("mystery", None)]
    assert [switch.to for switch in switches(models, 10 * GIB)] == ["a"]
    assert together(models, 10 * GIB) == (("a",),)


def test_the_largest_sets_that_fit_are_listed_and_none_is_part_of_another():
    models = [model("a", 6), model("b", 4), model("c", 3), model("d", 30)]
    assert together(models, 10 * GIB) == (("a", "b"), ("a", "c"), ("b", "c"))
    assert together(models, 13 * GIB) == (("a", "b", "c"),)
    assert together(models, 5 * GIB) == (("b",), ("c",))


def test_nothing_fits_a_budget_smaller_than_every_model():
    assert together([model("a", 6)], GIB) == ()


def test_many_models_are_filled_in_the_order_of_the_file():
    models = [model(f"m{index}", 3) for index in range(40)]
    assert together(models, 10 * GIB) == (("m0", "m1", "m2"),)


@pytest.mark.parametrize("budget", [5, 8, 11, 17, 40])
def test_the_forecast_never_holds_more_than_the_budget(budget):
    models = [model(f"m{index}", size, workspace=index % 2) for index, size in enumerate([4, 3, 5, 2, 4])]
    tier = TopTier(budget * GIB, SEGMENT_BYTES, {})
    for _ in range(3):
        for wanted in models:
            before = dict(tier.resident)
            switch = tier.bring_up(wanted)
            if switch.refused:
                assert tier.resident == before
            else:
                assert sum(tier.resident.values()) + wanted.workspace_bytes <= budget * GIB
                assert tier.resident[wanted.name] == wanted.weights_bytes


def test_low_priorities_give_up_first_whenever_they_were_used():
    low, high = PlannedModel("low", 4 * GIB, "size", priority=0), PlannedModel("high", 4 * GIB, "size", priority=2)
    found = switches([high, low, PlannedModel("c", 4 * GIB, "size", priority=1)], 10 * GIB)
    assert found[2].gives_up == (("low", 2 * GIB),)


def test_room_is_given_up_in_segments_of_the_configured_size():
    found = switches([model("a", 6), PlannedModel("b", 4 * GIB + 1, "size")], 10 * GIB, segment_bytes=1 << 20)
    assert found[1].gives_up == (("a", 1 << 20),)
