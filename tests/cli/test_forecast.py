import io

from rich.console import Console

from modelcache.cli.forecast import Amount, as_json, draw, forecast
from modelcache.cli.planning import PlannedModel

GIB = 1024**3
LINK = Amount(25_000_000_000, "assumed")
DISK = Amount(2_000_000_000, "assumed")


def make(*models, vram=20, ram=96, top_tier="vram"):
    top = Amount(vram * GIB, "80% of 25 GiB") if top_tier == "vram" else Amount(ram * GIB, "file")
    return forecast(models, top_tier=top_tier, top=top, ram=Amount(ram * GIB, "file"), link=LINK, disk=DISK)


def shown(found):
    stream = io.StringIO()
    draw(found, Console(file=stream, width=200))
    return stream.getvalue()


def model(name, gib, **more):
    return PlannedModel(name, None if gib is None else gib * GIB, "headers", **more)


def test_a_model_that_cannot_come_up_is_a_problem_and_shown():
    found = make(model("a", 4), model("huge", 30))
    assert found.problems == ("huge: larger than the whole budget",)
    assert "cannot come up: larger than the whole budget" in shown(found)


def test_a_model_whose_files_cannot_be_read_is_a_problem():
    found = make(PlannedModel("a", None, "unknown", problem="no file 'model.safetensors'"))
    assert found.problems == ("a: no file 'model.safetensors'",)


def test_unknown_sizes_are_no_problem_but_said():
    found = make(model("mystery", None))
    assert found.problems == ()
    assert "no size is known before the first load" in shown(found)
    assert "RAM: no size is known" in shown(found)
    assert as_json(found)["models"][0]["disk_to_ram_s"] is None


def test_the_page_shows_speeds_with_their_origin():
    text = shown(make(model("a", 4)))
    assert "VRAM  20.0 GiB  (80% of 25 GiB)" in text
    assert "RAM -> VRAM  25.0 GB/s  (assumed; change it with --link)" in text
    assert "disk -> RAM  2.0 GB/s  (assumed; change it with --disk)" in text


def test_each_switch_shows_who_gives_up_first_and_how_long_it_takes():
    text = shown(make(model("a", 12), model("b", 12)))
    assert [line.split() for line in text.splitlines() if line.startswith("b ")][-1] == (
        "b 4.0 GiB 0.17 s a 4.0 GiB".split()
    )


def test_models_that_all_fit_are_said_to():
    assert "  all 2: a, b" in shown(make(model("a", 4), model("b", 5)))
    assert "nobody" in shown(make(model("a", 4), model("b", 5)))


def test_many_sets_are_cut_short_in_the_page_and_not_in_json():
    found = make(*(model(f"m{index}", 6) for index in range(7)))
    assert "and 23 more sets (see --json)" in shown(found)
    assert len(as_json(found)["fit_together"]) == 35


def test_models_larger_than_both_tiers_come_from_disk_again():
    found = make(model("a", 15), model("b", 15), model("c", 15), vram=20, ram=16)
    assert found.short_of_ram_bytes == 9 * GIB
    assert "9.0 GiB more than there is room for" in shown(found)
    assert "given up when RAM is short" in shown(make(model("a", 15), model("b", 15), vram=20, ram=16))


def test_without_an_accelerator_there_is_no_link():
    found = make(model("a", 4), top_tier="ram", ram=8)
    assert "RAM -> VRAM" not in shown(found)
    assert "Can run at once in 8.0 GiB of RAM" in shown(found)
    assert as_json(found)["models"][0]["ram_to_vram_s"] is None


def test_json_has_bytes_and_seconds():
    found = as_json(make(model("a", 12, workspace_bytes=GIB, pin="vram"), model("b", 6), model("c", 6)))
    assert found["budgets"]["vram"] == {"bytes": 20 * GIB, "origin": "80% of 25 GiB"}
    assert found["speeds"]["link"] == {"bytes_per_s": 25_000_000_000, "origin": "assumed"}
    assert found["models"][0]["ram_to_vram_s"] == 12 * GIB / 25e9
    assert found["switches"][1]["gives_up"] == [{"name": "c", "bytes": 4 * GIB}]
    assert found["problems"] == []
