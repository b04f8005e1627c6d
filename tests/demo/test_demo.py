"""The demo from beginning to end, on generated weights and few requests."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("sklearn", reason="the demo trains on the digits of scikit-learn (pip install modelcache[demo])")

from modelcache import demo

NUM_REQUESTS = 24
# Whichever test comes first waits for the whole run.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What one run left behind: exit code, folder, standard output and standard error."""
    out = tmp_path_factory.mktemp("demo")
    script = f"from modelcache.demo import run; raise SystemExit(run(synthetic=True, out={str(out)!r}, num_requests={NUM_REQUESTS}))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False), out


def test_every_check_that_does_not_depend_on_speed_holds(finished):
    done, _ = finished
    lines = [line for line in done.stdout.splitlines() if line[:1] in "✓✗" and line]
    failed = [line for line in lines if line.startswith("✗")]
    assert len(lines) >= 28, done.stderr
    assert [line for line in failed if "faster" not in line] == []
    assert done.returncode == (1 if failed else 0)


def test_headings_say_that_the_weights_are_synthetic(finished):
    done, out = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<(?:title|h1|h2)>(.*?)</", page)
    assert len(headings) >= 7
    assert all("synthetic weights" in heading for heading in headings)
    assert "synthetic weights" in done.stdout.splitlines()[0]


def test_the_page_needs_nothing_from_elsewhere(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//[a-z]", page)
    assert not re.search(r"""(?:src|href)=["']""", page)
    assert len(page) < 2_000_000
    assert "<svg" in page
    assert "prefers-color-scheme:dark" in page


def test_the_picture_stands_alone_and_shows_every_run(finished):
    text = (finished[1] / "switches.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)
    words = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"delete and reload", "modelcache", "modelcache, with prefetch", "VRAM", "RAM"} <= set(words)
    assert any("synthetic weights" in each for each in words)
    assert "data-tip" not in text
    assert "prefers-color-scheme:dark" in text
    assert len(text) < 300_000


def test_the_trace_has_each_run_with_its_requests_moves_and_tiers(finished):
    events = json.loads((finished[1] / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    runs = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(runs) == 3
    for pid in runs:
        answers = [event for event in events if event["pid"] == pid and event["name"] == "answer"]
        assert len(answers) == NUM_REQUESTS
    cached = [pid for pid, name in runs.items() if name.startswith("modelcache")]
    for pid in cached:
        own = [event for event in events if event["pid"] == pid]
        assert {event["name"] for event in own if event["ph"] == "C"} == {"vram bytes", "ram bytes", "disk bytes"}
        assert all(event["args"]["reason"] for event in own if event.get("cat") == "move")


def test_spans_of_one_track_nest_or_follow_each_other(finished):
    events = json.loads((finished[1] / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    tracks = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    slack_us = 0.2  # Times are rounded to a tenth of a microsecond.
    for spans in tracks.values():
        open_until = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start + slack_us:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + slack_us
            open_until.append(end)


def test_progress_goes_to_standard_error_in_plain_lines(finished):
    done, _ = finished
    assert "\x1b" not in done.stderr + done.stdout
    assert f"{NUM_REQUESTS} of {NUM_REQUESTS} requests" in done.stderr
    assert "requests" not in done.stdout.splitlines()[0]


def test_damaged_weights_end_the_demo_with_words(monkeypatch, tmp_path, capsys):
    from modelcache.demo import weights

    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(weights, "installed_folder", lambda: tmp_path)
    assert demo.run(out=tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "force-reinstall" in captured.err
    assert "sha256" in captured.err
    assert not (tmp_path / "out").exists()
