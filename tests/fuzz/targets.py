"""What is fuzzed: one function of bytes for everything that reads what somebody else wrote, and the property of each.

A target returns when the property holds and raises anything else when not. Nothing here needs a fuzzer: the inputs kept
in `cases/` are given to the same functions by a test.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from modelcache.config import load_config
from modelcache.config.document import spell
from modelcache.config.layers import variable
from modelcache.config.values import Scalar, read_budget, read_idle, read_segment
from modelcache.dataplane.loading.folder_checks import checked_config, checked_parts
from modelcache.errors import ConfigError, WeightsError
from modelcache.headers import model_files, read_header, weight_places, weights_bytes
from modelcache.spec import LOADER_KINDS, check_loader, check_name, did_you_mean
from modelcache.units import format_bytes, parse_bytes, parse_duration, parse_percent, parse_rate

LONGEST_LINE = 4096


@dataclass(frozen=True)
class Target:
    """One thing to fuzz.

    Attributes:
        run: Raises when the property does not hold.
        seeds: Inputs to start from.
        words: What is worth putting into an input.
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


class _File:
    """A file in memory, with a path; its content is replaced for every input."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self.descriptor}"

    def holds(self, content: bytes) -> str:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, content, 0)
        return self.path


_FILE = _File()


def _in_words(error: Exception) -> None:
    """A message that a person can read and a log can carry."""
    text = str(error)
    assert text
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert len(line) <= LONGEST_LINE, len(line)


# -------------------------------------------------------------------------------------------------------- header


def _weights_file(data: bytes) -> bytes:
    """Raw bytes after a 0; after anything else a header, with its length before it and the data that it wants after."""
    if data[:1] == b"\0":
        return data[1:]
    body, num_bytes = data[1:], 0
    with suppress(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        ends = [each["data_offsets"][1] for name, each in json.loads(body).items() if name != "__metadata__"]
        num_bytes = min(int(max(ends, default=0)), 1 << 14)
    return struct.pack("<Q", len(body)) + body + bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)


def header(data: bytes) -> None:
    """Refused in words, or read as safetensors reads it: the same tensors, of the same bytes."""
    import safetensors

    content = _weights_file(data)
    try:
        mine = read_header(_FILE.holds(content))
    except WeightsError as error:
        _in_words(error)
        return
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == mine.tensors.keys()
    for name, entry in mine.tensors.items():
        assert tuple(theirs[name]["shape"]) == entry.shape
        assert theirs[name]["dtype"] == entry.dtype
        assert bytes(theirs[name]["data"]) == content[entry.begin : entry.end]
    assert mine.total_bytes + 8 + int.from_bytes(content[:8], "little") == len(content)


_HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "__metadata__": {"format": "pt"},
    "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
_EMPTY = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'

# ---------------------------------------------------------------------------------------------- configurations


def config(data: bytes) -> None:
    """Every problem at once, as `ConfigError`; or settings that can be shown, with names that are valid."""
    try:
        found = load_config(_FILE.holds(data), environ={})
    except ConfigError as error:
        _in_words(error)
        return
    for row in found.rows():
        assert row.key
    for warning in found.warnings:
        assert str(warning).isprintable()
    for spec in found.specs:
        assert check_name(spec.name) == spec.name


_VARIABLES = ("budgets.vram", "budgets.ram", "budgets.disk", "policy.idle", "device", "preload", "roots", "image_dir")


def environment(data: bytes) -> None:
    """The same for the environment; the first byte chooses a variable."""
    text = data[1:].decode("utf-8", "surrogateescape").replace("\0", "")
    name = variable(tuple(_VARIABLES[(data or b"\0")[0] % len(_VARIABLES)].split(".")))
    try:
        found = load_config(None, environ={name: text, f"{name}_X": text})
    except ConfigError as error:
        _in_words(error)
        return
    assert all(row.key for row in found.rows())


_YAML = b"""version: 1
device: cpu
budgets: {vram: 12GiB, ram: "80%"}
roots: [models]
models:
  a: {loader: transformers, path: models/a, dtype: bfloat16, priority: high, pin: ram}
  b: {loader: "pkg.module:make", size: 3GiB, idle: 10m, concurrency: 2}
preload: [a]
"""

# -------------------------------------------------------------------------------------------- names and sizes

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_DEVICES = {"con", "nul", "prn", "aux", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def _is_name(text: str) -> bool:
    """The grammar of names, told once more and in another way."""
    if not 1 <= len(text) <= 64 or not set(text) <= _LETTERS | set("._-"):
        return False
    return text[0] in _LETTERS and text[-1] in _LETTERS and ".." not in text and text.partition(".")[0] not in _DEVICES


def names(data: bytes) -> None:
    """What may be a name is what the grammar says, and stays one part of a path; loaders are kinds or functions."""
    text = data.decode("utf-8", "surrogatepass") if _is_utf8(data) else data.decode("latin-1")
    try:
        assert check_name(text) == text
    except ValueError as error:
        assert not _is_name(text)
        _in_words(error)
    else:
        assert _is_name(text)
        assert Path("/root", text).parent == Path("/root")
        assert os.path.normpath(text) == text
    try:
        assert check_loader(text) in {*LOADER_KINDS, text}
    except ValueError as error:
        _in_words(error)
    else:
        module, _, attribute = text.partition(":")
        assert text in LOADER_KINDS or all(word.isidentifier() for word in f"{module}.{attribute}".split("."))
    assert did_you_mean(text, LOADER_KINDS).isprintable()
    assert spell(("models", text, 0)).isprintable()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
_UNITS = {f"{prefix}{kind}": (1024 if kind == "iB" else 1000) ** power
          for kind in ("iB", "B") for power, prefix in enumerate("KMGT", 1)} | {"B": 1}  # fmt: skip
_SECONDS = {"ms": Fraction(1, 1000), "s": 1, "m": 60, "h": 3600, "d": 86400}


def _bytes_in(text: str) -> int | None:
    found = re.fullmatch(rf"{_NUMBER} *([A-Za-z]+)", text.strip())
    if found is None or found[2] not in _UNITS:
        return None
    return int(Fraction(found[1]) * _UNITS[found[2]]) or None


def _seconds_in(text: str) -> Fraction | None:
    if re.fullmatch(rf"(?:{_NUMBER}(?:ms|[smhd]))+", text.strip()) is None:
        return None
    return sum(
        (Fraction(number) * _SECONDS[unit] for number, unit in re.findall(rf"{_NUMBER}(ms|[smhd])", text)), Fraction()
    )


def _tried(function: Callable[[str], object], text: str) -> object:
    """Its answer; a refusal as an exception of the one kind that is allowed."""
    try:
        return function(text)
    except ValueError as error:
        _in_words(error)
        return error


def sizes(data: bytes) -> None:
    """What a size, share, speed and duration may be is what a second grammar says, and they are worth what it says."""
    text = data.decode("utf-8", "replace")
    found = _tried(parse_bytes, text)
    assert (found if isinstance(found, int) else None) == _bytes_in(text), found
    if isinstance(found, int):
        assert format_bytes(found)
    rate, slash, second = text.strip().partition("/")
    found = _tried(parse_rate, text)
    assert (found if isinstance(found, int) else None) == (_bytes_in(rate) if slash and second.strip() == "s" else None)
    share = _tried(parse_percent, text)
    assert not isinstance(share, float) or 0 < share <= 1
    seconds, wanted = _tried(parse_duration, text), _seconds_in(text)
    if isinstance(seconds, float):
        assert wanted is not None
        assert abs(Fraction(seconds) - wanted) <= wanted / 10**9
    else:
        assert wanted is None or seconds == 0
    for function in (read_budget, read_idle, read_segment):
        _tried(lambda each, function=function: function(Scalar(each)), text)


# ----------------------------------------------------------------------------------- JSON beside the weights

_KINDS = ("model.safetensors.index.json", "modules.json", "model_index.json", "config.json", "2/router_config.json")


class _Folder:
    """A folder of a model, made when first used; one of its JSON files is replaced for every input."""

    def __init__(self) -> None:
        self._made: tempfile.TemporaryDirectory | None = None

    @property
    def path(self) -> Path:
        if self._made is None:
            self._made = tempfile.TemporaryDirectory(prefix="modelcache-fuzz-")
            atexit.register(self._made.cleanup)
            root = Path(self._made.name)
            for place in (root / "outside", root / "model" / "2"):
                place.mkdir(parents=True)
            for place in (root, root / "outside", root / "model" / "2"):
                (place / "model.safetensors").write_bytes(struct.pack("<Q", len(_EMPTY)) + _EMPTY)
            (root / "model" / "model-1.safetensors").write_bytes(struct.pack("<Q", len(_EMPTY)) + _EMPTY)
        return Path(self._made.name) / "model"


_FOLDER = _Folder()


def folder(data: bytes) -> None:
    """Only `WeightsError`; and whatever the files say, nothing outside of the folder is a part of the model."""
    root = _FOLDER.path
    written = root / _KINDS[(data or b"\0")[0] % len(_KINDS)]
    written.write_bytes(data[1:])
    if written.name == "router_config.json":
        (root / "modules.json").write_text('[{"path":"2","type":"sentence_transformers.models.Router"}]')
    try:
        for look in (model_files, weight_places, lambda place: [each.path for each in checked_parts("m", place)]):
            with suppress(WeightsError):
                for place in look(root):
                    assert place.resolve() == root.resolve() or root.resolve() in place.resolve().parents, place
        for question in (weights_bytes, lambda place: checked_config("m", place / written.relative_to(root))):
            try:
                question(root)
            except WeightsError as error:
                _in_words(error)
    finally:
        written.unlink()
        (root / "modules.json").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- image files


def image(data: bytes) -> None:
    """Only `UnusableError`, whatever an image file says; the first byte chooses whether a manifest is wrapped well."""
    from modelcache.dataplane.images.format import MAGIC, UnusableError, describe

    content = data[1:]
    if data[:1] != b"\0":
        size = 1 << (data[:1] or b"\1")[0] % 14
        content = MAGIC + struct.pack("<IQ", zlib.crc32(content), len(content)) + content + bytes(size)
    _FILE.holds(content)
    with suppress(UnusableError):
        describe(_FILE.descriptor, Path("x.image"))


_MANIFEST = {
    "version": 2,
    "part": "m",
    "about": {"class": "X"},
    "segments": [{"offset": 0, "size": 64, "fingerprint": "00", "xxh3": "00"}],
    "storages": [
        {"segment": 0, "offset": 0, "size": 64, "xxh3": "00", "tensors": {"a": ["torch.float32", [2], [1], 0]}}
    ],
}

_JSON = (b'"', b"{}", b"[]", b"null", b"-0", b"1e9", b"NaN", b"\\u0000", b"\\ud800", b"9" * 25, b"[" * 99)

TARGETS: dict[str, Target] = {
    "header": Target(
        header,
        (
            b"\1" + json.dumps(_HEADER).encode(),
            b"\1" + _EMPTY,
            b"\1{}",
            b"\0\x80\x04PK\x03\x04",
            b"\0version https://git-lfs",
        ),
        (
            *_JSON,
            b"dtype",
            b"shape",
            b"data_offsets",
            b"__metadata__",
            b"F4",
            b"F64",
            b"[0,0]",
            b"\xef\xbb\xbf",
            b"281474976710657",
        ),
    ),
    "config": Target(
        config,
        (_YAML, b"version: 1\n", b"models: {a: {path: x}}\n", b"budgets:\n  vram: auto\n"),
        (
            b"&a ",
            b"*a",
            b"!!python/object:x ",
            b"<<: ",
            b"---\n",
            b"%YAML 1.1\n",
            b"? ",
            b"\t",
            b"models:",
            b'"\\x00"',
            b"|\n",
            b"{" * 40,
        ),
    ),
    "environment": Target(
        environment,
        tuple(
            bytes([number]) + text
            for number, text in enumerate((b"8GiB", b"80%", b"none", b"10m", b"cpu", b"a,b", b"x:/y", b"z"))
        ),
        (b"GiB", b"%", b"auto", b"none", b"never", b",", b":", b"../", b"~"),
    ),
    "names": Target(
        names,
        (b"qwen-7b", b"a.b_c", b"nul", b"../etc", b"pkg.module:function", b"transformers", "\u202e".encode()),
        (b"..", b"/", b"\\", b"\0", b"\n", b"com1", b"%2e", b"~", "ａ".encode(), b"import", b":"),
    ),
    "sizes": Target(
        sizes,
        (b"24GiB", b"1.5GB", b"80%", b"8GB/s", b"1m30s", b"never", b"16 Gb", b"4096", b"-1GiB", b".5%"),
        (b"KiB", b"TB", b"ms", b"1e400", b"nan", b"inf", b"9" * 21, b".", "٣".encode(), b"0x", b"_"),
    ),
    "folder": Target(
        folder,
        (
            b'\0{"weight_map":{"x":"model-1.safetensors"}}',
            b'\0{"weight_map":{"x":"../model.safetensors"}}',
            b'\1[{"path":"2","type":"sentence_transformers.models.Dense"},{"path":"../outside"}]',
            b'\2{"_class_name":"P","2":["diffusers","X"],"../outside":["a","b"]}',
            b'\3{"model_type":"bert","_x":1,"attn_implementation":"a/b","transformers_weights":"x"}',
            b'\4{"types":{"q":"sentence_transformers.models.Dense","../../outside":"x"}}',
        ),
        (
            *_JSON,
            b"weight_map",
            b"path",
            b"types",
            b"../outside",
            b"/etc",
            b".safetensors",
            b"\\",
            b"%2e%2e",
            b"\xe2\x80\xae",
        ),
    ),
    "image": Target(
        image,
        (b"\6" + json.dumps(_MANIFEST, separators=(",", ":")).encode(), b"\0MCIMAGE1" + bytes(12), b"\6" + b"[" * 5000),
        (*_JSON, b"torch.float32", b"torch.nn", b"version", b"segments", b"storages", b"tensors", b"-1", b"true"),
    ),
}
