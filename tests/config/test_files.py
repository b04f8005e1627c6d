"""Files that are no configuration at all, and those made to harm: refused at once, before anything is parsed."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.config import check_text, effective
from modelcache.config.document import LARGEST_FILE_BYTES, MOST_FINDINGS, parse
from modelcache.errors import ConfigError


def lines_of(data: bytes) -> list[str]:
    """The findings about the form of a file."""
    return [str(finding) for finding in parse(data, "m.yaml").findings]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\xef\xbb\xbfversion: 1\n", "m.yaml:1:1: begins with a byte order mark; save the file as plain UTF-8"),
        (b"\xff\xfev\x00", "m.yaml:1:1: begins with a byte order mark; save the file as plain UTF-8"),
        (b"version: 1\nname: \xff\n", "m.yaml:2:7: this is not UTF-8; save the file as plain UTF-8"),
        (b"version: 1\n  \x1b[31m", "m.yaml:2:3: control character U+001B; remove it"),
        (b"version: 1\r\nx: \x00", "m.yaml:2:4: control character U+0000; remove it"),
        (b"a: 1\nb:\n\tc: 1\n \td: 1\n", "m.yaml:3:1: a tab in the indentation; use spaces"),
        (
            b"a: [1, 2\n",
            "m.yaml:2:1: this is not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence; "
            "check quotes, colons and indentation",
        ),
        (
            b"a: b: c\n",
            "m.yaml:1:5: this is not YAML: mapping values are not allowed here; check quotes, colons and indentation",
        ),
        (b'a: "\\UFFFFFFFF"\n', "m.yaml: this is not YAML: an escape or a directive cannot be read"),
        (b'a: "\\ud800"\n', "m.yaml:1:4: an escape in this text is no character; write the text itself"),
        (
            b"%TAG ! tag:x,2000:\n---\na: 1\n",
            "m.yaml:1:1: directives (lines that begin with %) are not allowed here; remove them",
        ),
        (b"a: !\n", "m.yaml:1:4: tags (words that begin with !) are not allowed here; remove it"),
        (b"*a : 1\n", "m.yaml:1:1: anchors and aliases are not allowed here; write the value out"),
        (b"? [a]\n: 1\n", "m.yaml:1:3: a key must be a word, not a mapping or a list"),
        (b"{a: 1}: 2\n", "m.yaml:1:1: a key must be a word, not a mapping or a list"),
        (b"~\n", "m.yaml:1:1: a configuration is a mapping of keys to values, such as 'version: 1'"),
        (b"16GiB", "m.yaml:1:1: a configuration is a mapping of keys to values, such as 'version: 1'"),
    ],
)
def test_what_is_not_a_plain_mapping_is_answered_in_one_line(data: bytes, line: str) -> None:
    assert lines_of(data)[0] == line


@pytest.mark.parametrize("text", ["", "\n", "# only a remark\n", "---\n", "models:\n", "budgets:\npreload:\nroots:\n"])
def test_a_file_that_says_nothing_is_all_defaults(text: str) -> None:
    assert check_text(text).settings == check_text("version: 1").settings


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{a: " * 16_000, "- " * 30_000, "? " * 30_000, "a: " + "[" * 50_000, "&a " * 20_000], ids=len
)
def test_a_deep_file_neither_crashes_nor_takes_long(text: str) -> None:
    before = sys.getrecursionlimit()
    with pytest.raises(ConfigError) as caught:
        check_text(text)
    assert len(caught.value.findings) <= MOST_FINDINGS + 1
    assert sys.getrecursionlimit() == before


def test_doubling_aliases_are_never_expanded() -> None:
    text = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ConfigError) as caught:
        check_text(text)
    assert "anchors and aliases are not allowed here" in str(caught.value)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path) -> None:
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * LARGEST_FILE_BYTES)
    assert effective(str(path), environ={}).warnings == ()
    path.write_bytes(b"#" * (LARGEST_FILE_BYTES + 1))
    with pytest.raises(ConfigError) as caught:
        effective(str(path), environ={})
    assert str(caught.value) == f"{path}: is larger than 64 KiB; this does not look like a modelcache configuration"


def test_a_file_of_nothing_but_mistakes_is_answered_with_a_hundred() -> None:
    with pytest.raises(ConfigError) as caught:
        check_text("".join(f"k{number}: 1\n" for number in range(5_000)))
    findings = caught.value.findings
    assert len(findings) == MOST_FINDINGS + 1
    assert str(findings[-1]) == "modelcache.yaml: 4900 more problems follow"


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, "/dev/null"):
        with pytest.raises(ConfigError, match=r"is not a regular file; name the YAML file itself"):
            effective(str(path), environ={})


@pytest.mark.parametrize("path", ["a\0b.yaml", "x" * 5000])
def test_a_path_that_no_file_can_have_is_refused_in_words(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be opened: "):
        effective(path, environ={})


# --- no text makes anything else than a ConfigError escape ------------------------------------------------------------

KEYS = ["version", "device", "budgets", "vram", "policy", "idle", "preload", "roots", "models", "loader", "path", "a.b"]
WORDS = ["1", "16 Gb", "80%", "lru", "embed", "transformers", "m:f", "../x", "~", "''", '"\\0"', '"\\ud800"', ".inf"]
TREES = st.recursive(
    st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.lists(st.tuples(st.sampled_from(KEYS), TREES), max_size=6).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs)
)


@settings(max_examples=250, deadline=None)
@given(FILES)
def test_only_a_config_error_escapes_from_any_tree_of_known_words(text: str) -> None:
    try:
        check_text(text)
    except ConfigError as error:
        assert all(line.isprintable() for line in str(error).splitlines())
        str(error).encode()
        assert all(finding.path == "modelcache.yaml" for finding in error.findings)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120))
def test_no_bytes_at_all_make_the_parser_raise(data: bytes) -> None:
    assert parse(data, "m.yaml").path == "m.yaml"
