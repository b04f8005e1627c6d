"""Weight files as people and attackers make them: what is refused, in which words, and what is accepted."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest

from modelcache.errors import WeightsError
from modelcache.headers import model_files, model_headers, read_header, read_json, weights_bytes


def entry(shape: object = (4,), begin: object = 0, end: object = 4, dtype: object = "U8") -> dict:
    return {
        "dtype": dtype,
        "shape": shape if not isinstance(shape, tuple) else list(shape),
        "data_offsets": [begin, end],
    }


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(text: str, data: bytes = b"abcd") -> bytes:
    """A file with one tensor 'a' whose entry is the given text."""
    return file_of(b'{"a":' + text.encode() + b"}", data)


def refused(path: Path, content: bytes, name: str = "") -> str:
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_header(path, name=name)
    assert caught.value.path == str(path)
    return str(caught.value).removeprefix(f"{path}: ")


MIB = 2**20
ATTACKS = {
    "H01 empty": (b"", "the file is empty. The download is incomplete."),
    "H01 seven bytes": (b"\x01\0\0\0\0\0\0", "7 bytes are too few for a safetensors file. The download is"),
    "H02 length beyond the file": (
        file_of(b"{}", length=50),
        "the header claims 50 bytes, but the file has only 10. The download is incomplete",
    ),
    "H03 length 2^64-1": (b"\xff" * 8 + b"{}", "the header claims 18,446,744,073,709,551,615 bytes, above the 32 MiB"),
    "H04 length above the cap": (file_of(b"{}", length=100_000_001), "the header claims 100,000,001 bytes, above"),
    "H05 length 0": (file_of(b"", b"abcd"), "the header is empty"),
    "H06 leading space": (file_of(b' {"a":1}'), "the header must start with '{', but starts with b' {\"'"),
    "H06 leading newline": (file_of(b"\n{}"), "the header must start with '{'"),
    "H06 byte order mark": (file_of(b"\xef\xbb\xbf{}"), "the header must start with '{'"),
    "H07 not UTF-8": (file_of(b'{"\xff":1}'), "the header is not UTF-8 at byte 2"),
    "H07 lone surrogate": (
        file_of(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcd"),
        "the header is not valid JSON",
    ),
    "H08 array": (file_of(b"[]"), "the header must start with '{'"),
    "H08 truncated": (file_of(b'{"a":{"dtype":"U8","shape":[4],'), "its entry is longer than"),
    "H08 truncated after an entry": (
        file_of(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},', b"abcd"),
        "a tensor's name is damaged",
    ),
    "H08 NaN": (one('{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}'), "its shape holds NaN, not an exact"),
    "H08 exponent": (one('{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}'), "its shape holds 4e0, not an exact"),
    "H08 minus zero": (one('{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}'), "its data_offsets holds -0, not"),
    "H08 float": (one('{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}'), "its shape holds 4.0, not an exact"),
    "H08 true": (one('{"dtype":"U8","shape":[true],"data_offsets":[0,4]}'), "its shape holds true, not an exact"),
    "H08 leading zero": (one('{"dtype":"U8","shape":[04],"data_offsets":[0,4]}'), "its entry is not valid JSON"),
    "H08 digits of another script": (one('{"dtype":"U8","shape":[٤],"data_offsets":[0,4]}'), "is not valid JSON"),
    "H09 nested in place of an entry": (file_of(b'{"a":' + b"[" * 100_000), "its entry is not an object"),
    "H09 nested in a shape": (file_of(b'{"a":{"shape":' + b"[" * 100_000), "its entry is longer than 4,096 characters"),
    "H09 nested within the caps": (one('{"shape":' + "[" * 3000 + "]" * 300 + "}"), "its entry"),
    "H10 duplicate name": (
        file_of(b'{"lm_head.weight":%s,"lm_head.weight":%s}' % ((json.dumps(entry()).encode(),) * 2), b"abcd"),
        "tensor 'lm_head.weight' appears twice in the header. Refused: readers would disagree on which one counts.",
    ),
    "H10 duplicate name, spelled otherwise": (
        file_of(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry()).encode(),) * 2), b"abcd"),
        "tensor 'a' appears twice in the header.",
    ),
    "H11 duplicate inner key": (
        one('{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}'),
        "the key 'dtype' appears twice in its entry",
    ),
    "H11 unknown inner key": (
        one('{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1}'),
        "unknown key 'x' in its entry; known: dtype, shape, data_offsets",
    ),
    "H12 overlap": (
        file_of({"h.0.w": entry((4096,), 0, 4096), "h.1.w": entry((4096,), 0, 4096)}, bytes(4096)),
        "tensors 'h.0.w' and 'h.1.w' claim the same bytes 0-4096. The file is damaged or malicious; not loaded.",
    ),
    "H12 partial overlap": (
        file_of({"a": entry((4,), 0, 4), "b": entry((4,), 2, 6)}, b"abcdef"),
        "tensors 'a' and 'b' claim the same bytes 2-4.",
    ),
    "H12 empty tensor inside another": (
        file_of({"a": entry((4,), 0, 4), "b": entry((0,), 2, 2)}, b"abcd"),
        "tensors 'a' and 'b' claim the same bytes 2-2.",
    ),
    "H13 hole": (
        file_of({"a": entry((2,), 0, 2), "b": entry((2,), 4, 6)}, b"abcdef"),
        "bytes 2-4 before tensor 'b' belong to no tensor. The file is damaged or malicious",
    ),
    "H13 leading hole": (file_of({"a": entry((2,), 2, 4)}, b"abcd"), "bytes 0-2 before tensor 'a' belong to no"),
    "H13 trailing ZIP": (
        file_of({"a": entry()}, b"abcdPK\x03\x04" + bytes(60)),
        "64 bytes follow the last tensor and belong to none. Some tools write such files: save it again",
    ),
    "H13 data without a tensor": (file_of(b"{}", b"abcd"), "4 bytes follow the last tensor"),
    "H14 end before begin": (file_of({"a": entry((4,), 4, 0)}, b"abcd"), "its data_offsets [4, 0] run backwards"),
    "H14 negative": (file_of({"a": entry((4,), -4, 0)}, b"abcd"), "its data_offsets holds -4, not an exact"),
    "H14 beyond the file": (
        file_of({"a": entry((2**40,), 0, 2**40)}, b"abcd"),
        "present (header promises 1,099,511,627,8",
    ),
    "H15 wraps to the right size": (
        file_of({"a": entry((2**33, 2**33, 4), 0, 16, "F32")}, bytes(16)),
        (
            "shape [8589934592, 8589934592, 4] of F32 takes 1,180,591,620,717,411,303,424 bytes, but its data_offsets "
            "span 16."
        ),
    ),
    "H15 offset of 21 digits": (
        one('{"dtype":"U8","shape":[4],"data_offsets":[0,111111111111111111111]}'),
        "holds 1111",
    ),
    "H16 shape and offsets differ": (
        file_of({"a": entry((3,), 0, 4)}, b"abcd"),
        "shape [3] of U8 takes 3 bytes, but its data_offsets span 4.",
    ),
    "H16 unknown dtype": (file_of({"a": entry(dtype="F128")}, b"abcd"), "has the dtype 'F128', which is not one of"),
    "H16 dtype is a number": (file_of({"a": entry(dtype=8)}, b"abcd"), "its dtype is not a string"),
    "H16 dtype is a float": (file_of({"a": entry(dtype=8.5)}, b"abcd"), "its dtype is not a string"),
    "H16 missing field": (one('{"dtype":"U8","shape":[4]}'), "the key 'data_offsets' is missing in its entry"),
    "H16 three offsets": (one('{"dtype":"U8","shape":[4],"data_offsets":[0,4,8]}'), "data_offsets holds 3 numbers"),
    "H16 shape is an object": (one('{"dtype":"U8","shape":{},"data_offsets":[0,4]}'), "its entry is not valid JSON"),
    "H16 shape is null": (one('{"dtype":"U8","shape":null,"data_offsets":[0,4]}'), "its shape is not a list"),
    "H17 truncated data": (
        file_of({"a": entry((3 * MIB,), 0, 3 * MIB)}, bytes(MIB)),
        "1.0 MiB of 3.0 MiB present (header promises 3,145,808 bytes). The download is incomplete.",
    ),
    "H18 rank 100,000": (
        one('{"dtype":"U8","shape":[' + "1," * 99_999 + '1],"data_offsets":[0,1]}', b"a"),
        "tensor 'a': has rank 100,000; at most 32 is allowed. Not loaded.",
    ),
    "H18 rank 33": (file_of({"a": entry((1,) * 33, 0, 1)}, b"a"), "has rank 33; at most 32 is allowed"),
    "H18 offsets of 100,000 numbers": (
        one('{"dtype":"U8","shape":[1],"data_offsets":[' + "0," * 99_999 + "1]}", b"a"),
        "has rank 100,000; at most 32",
    ),
    "H19 dimension above 2^48": (
        file_of({"a": entry((0, 2**63 - 1), 0, 0)}),
        "has a dimension of 9,223,372,036,854,775,807; at most 2^48 is allowed",
    ),
    "H20 too many tensors": (
        file_of(b'{"a":' + b'{"data_offsets":0},' * 500_001),
        "the header holds 500,001 tensors; at most 500,000 are allowed. Not loaded.",
    ),
    "H21 metadata above 1 MiB": (
        file_of({"__metadata__": {"x": "y" * MIB}}),
        "__metadata__ is larger than 1 MiB, the most allowed. Not loaded.",
    ),
    "H21 metadata above 1 MiB in many keys": (
        file_of({"__metadata__": {str(i): "y" * 1000 for i in range(1100)}}),
        "__metadata__ is larger than 1 MiB",
    ),
    "H21 metadata above 1 MiB in UTF-8": (
        file_of(json.dumps({"__metadata__": {"x": "é" * 600_000}}, ensure_ascii=False).encode()),
        "__metadata__ is larger than 1 MiB",
    ),
    "H21 value is a number": (file_of({"__metadata__": {"x": 1}}), "the value of 'x' in __metadata__ is not a string"),
    "H21 metadata is a list": (file_of({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "H21 metadata as a tensor": (
        file_of({"__metadata__": entry()}, b"abcd"),
        "the value of 'shape' in __metadata__ is not a string",
    ),
    "H21 metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "__metadata__ appears twice"),
    "H21 a metadata key twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "the key 'a' appears twice"),
    "H22 NUL": (file_of({"a\0b": entry()}, b"abcd"), "tensor 'a\\x00b': the name holds characters that do not print"),
    "H22 newline": (file_of({"a\nb": entry()}, b"abcd"), "the name holds characters that do not print"),
    "H22 ANSI escape": (file_of({"a\x1b[31m": entry()}, b"abcd"), "the name holds characters that do not print"),
    "H22 right-to-left override": (
        file_of(json.dumps({"a\u202eb": entry()}, ensure_ascii=False).encode(), b"abcd"),
        "the name holds characters that do not print",
    ),
    "H22 empty name": (file_of({"": entry()}, b"abcd"), "a tensor has an empty name"),
    "H22 name of 1 MB": (file_of({"a" * 10**6: entry()}, b"abcd"), "a tensor's name is damaged or longer than 1,024"),
    "H22 name of 1,025 bytes": (file_of({"a" * 1025: entry()}, b"abcd"), "the name is longer than 1,024 bytes"),
    "H22 name of 1,026 bytes in 513 letters": (
        file_of(json.dumps({"é" * 513: entry()}, ensure_ascii=False).encode(), b"abcd"),
        "the name is longer than 1,024 bytes",
    ),
    "H23 three values of four bits": (
        file_of({"a": entry((3,), 0, 1, "F4")}, b"a"),
        "holds 3 values of F4, which is no whole number of bytes",
    ),
    "text after the header": (file_of(b'{}{"a":1}'), "text follows the header's last '}'"),
    "no comma": (file_of(b'{"a":%s "b":1}' % json.dumps(entry()).encode(), b"abcd"), "the header is not valid JSON"),
    "no colon": (file_of(b'{"a" 1}'), "the header is not valid JSON, at character 4: ' 1}'"),
    "pickle": (
        b"\x80\x04\x95\x1c\0\0\0\0\0\0\0\x8c",
        (
            "this is a pickle (starts with 80 04), which can run code when loaded. Convert it to safetensors, or load it "
            "in a loader of your own if you trust its author."
        ),
    ),
    "ZIP of torch.save": (b"PK\x03\x04" + bytes(100), "this is a ZIP archive as torch.save writes it, which can run"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 908683760\n",
        "134 bytes, a Git LFS pointer, not the weights. Run 'git lfs pull' in that folder.",
    ),
    "HTML": (
        b"<!DOCTYPE html><html><body>404</body></html>",
        "starts with '<!DOCTYPE html>': the download saved an error page. Download it again.",
    ),
    "HTML after white space": (b"\n  <html lang='en'>", "starts with \"<html lang='en'>\": the download saved"),
    "JSON error": (b'{"error": "Repository not found"}', "starts with '{': this is JSON, not weights."),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "this is a GGUF file, not safetensors."),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "this is no safetensors file."),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_or_broken_file_is_refused_in_words(attack: str, tmp_path: Path) -> None:
    content, words = ATTACKS[attack]
    message = refused(tmp_path / "model.safetensors", content)
    assert words in message
    assert message.isprintable()


def test_a_refusal_names_the_model_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": entry(dtype="F128")}, b"abcd"))
    with pytest.raises(WeightsError) as caught:
        read_header(path, name="llama")
    assert (caught.value.name, caught.value.path, caught.value.tensor) == ("llama", str(path), "a")


def test_the_whole_message_of_a_truncated_file_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "model-00002-of-00004.safetensors"
    header = json.dumps({"a": entry((4_939_116_000,), 0, 4_939_116_000)}).encode()
    path.write_bytes(file_of(header))
    os.truncate(path, 3_328_599_655)
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    promised = 8 + len(header) + 4_939_116_000
    assert str(caught.value) == (
        f"{path}: 3.1 GiB of 4.6 GiB present (header promises {promised:,} bytes). The download is incomplete."
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 2**22,
        b'{"__metadata__":{"a":"' + b"a" * 2**23,
        b'{"' + b"a" * 2**23,
        b"{" + b'"a":"",' * 2**20,
        b'{"a":{' + b" " * 2**23,
    ],
    ids=["rank", "metadata", "name", "strings", "spaces"],
)
def test_a_huge_header_is_refused_without_making_objects_of_it(body: bytes, tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(body))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError):
            read_header(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The bytes, the text, and next to nothing else.
    assert peak_bytes < 2 * len(body) + 2**20


def test_what_is_no_regular_file_is_refused_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        for name, words in (("pipe.safetensors", "a named pipe"), ("s", "a socket"), (".", "a folder")):
            with pytest.raises(WeightsError, match=f"this is {words}, not a regular file; not loaded"):
                read_header(tmp_path / name)
    with pytest.raises(WeightsError, match="this is a device, not a regular file"):
        read_header("/dev/null")
    with pytest.raises(WeightsError, match="the file is empty"):
        read_header("/proc/self/status")


def test_a_missing_file_says_what_the_folder_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(WeightsError) as caught:
        model_files(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no file 'model.safetensors'. The folder has: config.json, pytorch_model.bin (pickle, not loaded)."
    )
    with pytest.raises(WeightsError, match="no file 'other.safetensors'. The folder has: config.json"):
        model_files(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="There is no such folder"):
        model_files(tmp_path / "nowhere" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="The folder is empty"):
        model_files(tmp_path / "empty")


def test_a_pickle_by_name_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(file_of({"a": entry()}, b"abcd"))
    with pytest.raises(WeightsError, match="a pickle by its name"):
        model_files(tmp_path / "model.pt")


def test_a_path_with_a_nul_is_an_error_in_words() -> None:
    with pytest.raises(WeightsError, match="cannot be opened"):
        read_header("a\0b")


# ---------------------------------------------------------------------------------------------------- accepted


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = file_of(
        {"__metadata__": {"format": "pt"}, "b": entry((2, 2), 2, 6), "a": entry((), 0, 2, "F16")}, b"x" * 6
    )
    path.write_bytes(content)
    header = read_header(path)
    start = len(content) - 6
    assert dict(header.metadata) == {"format": "pt"}
    assert header.tensors["a"].shape == ()
    assert (header.tensors["a"].begin, header.tensors["a"].end) == (start, start + 2)
    assert (header.tensors["b"].begin, header.tensors["b"].size_bytes) == (start + 2, 4)
    assert (header.total_bytes, header.identity.size) == (6, len(content))


def test_unusual_but_valid_spellings_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    body = (
        b'{\n "a\\u00e9/../x" : { "shape" : [ 2 , 1 ] ,\t"data_offsets":[ 0 , 2 ], "dtype":"U8"},'
        b'"__metadata__" : { "k" : "v\\n" , "empty" : "" } , "z":{"dtype":"F4","shape":[4],"data_offsets":[2,4]} }   '
    )
    path.write_bytes(file_of(body, b"abcd"))
    header = read_header(path)
    assert set(header.tensors) == {"aé/../x", "z"}
    assert dict(header.metadata) == {"k": "v\n", "empty": ""}


def test_limits_are_allowed_up_to_and_with_themselves(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        file_of(
            {"a" * 1024: entry((1,) * 32, 0, 1), "b": entry((0, 2**48), 1, 1), "__metadata__": {"x": "y" * 2**19}}, b"z"
        )
    )
    assert len(read_header(path).tensors) == 2


def test_weights_that_are_not_finite_are_legal(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": entry((1,), 0, 4, "F32")}, struct.pack("<f", float("nan"))))
    assert read_header(path).total_bytes == 4


def test_a_real_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    body = json.dumps({"a": entry()}).encode().ljust(0x0480)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(body, b"abcd"))
    assert path.read_bytes()[:2] == b"\x80\x04"
    assert set(read_header(path).tensors) == {"a"}


# ------------------------------------------------------------------------------------------- agreement with safetensors


def test_whatever_is_accepted_here_safetensors_accepts_too(tmp_path: Path) -> None:
    """Mutations of real files: the strict parser may refuse more, and may never accept more."""
    import random

    safetensors = pytest.importorskip("safetensors")
    rng = random.Random(7)
    base = {"a": entry((2, 3), 0, 24, "F32"), "__metadata__": {"k": "v"}, "b.c": entry((4,), 24, 32, "BF16")}
    pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"0",
        b"-",
        b"1",
        b" ",
        b"\\",
        b"a",
        b"e",
        b"\xff",
        b"null",
        b"\n",
    ]
    path = tmp_path / "model.safetensors"
    num_accepted = 0
    for _ in range(1500):
        body = bytearray(json.dumps(base, separators=(",", ":")).encode())
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(body))
            body[place : place + rng.randint(0, 2)] = rng.choice(pieces)
        content = file_of(bytes(body), bytes(32))
        path.write_bytes(content)
        try:
            mine = read_header(path)
        except WeightsError:
            continue
        num_accepted += 1
        theirs = dict(safetensors.deserialize(content))
        assert set(theirs) == set(mine.tensors)
        assert {name: tuple(each["shape"]) for name, each in theirs.items()} == {
            name: each.shape for name, each in mine.tensors.items()
        }
        for name, each in mine.tensors.items():
            assert bytes(theirs[name]["data"]) == content[each.begin : each.end]
    assert num_accepted > 100


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_corpus_holds_nothing_that_would_be_a_fine_file(attack: str, tmp_path: Path) -> None:
    """Where safetensors is more lenient the difference is one that we refuse on purpose."""
    safetensors = pytest.importorskip("safetensors")
    lenient = (
        "H06 leading space",
        "H06 leading newline",
        "H10",
        "H11 unknown",
        "H18",
        "H19",
        "H20",
        "H21",
        "H22",
        "H08 minus",
    )
    content, _ = ATTACKS[attack]
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return
    assert attack.startswith(lenient)


# ------------------------------------------------------------------------------------------------- several files


def sharded(folder: Path, weight_map: dict[str, str] | bytes, shards: dict[str, list[str]]) -> Path:
    for shard, names in shards.items():
        header = {name: entry((4,), 4 * i, 4 * i + 4) for i, name in enumerate(names)}
        (folder / shard).write_bytes(file_of(header, b"abcd" * len(names)))
    index = folder / "model.safetensors.index.json"
    index.write_bytes(
        weight_map if isinstance(weight_map, bytes) else json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    )
    return index


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (
            {"a": "1.safetensors", "b": "9.safetensors"},
            "shard '9.safetensors' is missing. The folder has: 1.safetensors",
        ),
        ({"a": "../1.safetensors"}, "tensor 'a': names '../1.safetensors', outside its folder"),
        ({"a": "/etc/1.safetensors"}, "outside its folder"),
        ({"a": "x\\1.safetensors"}, "outside its folder"),
        ({"a": "..safetensors"}, "outside its folder"),
        ({"a": "1.bin"}, "names '1.bin', which is no .safetensors file"),
        ({"a": "model.safetensors.index.json"}, "which is no .safetensors file"),
        ({"a": "1\n.safetensors"}, "which is no .safetensors file"),
        ({"a": 1}, "names 1, which is no .safetensors file"),
        ({}, "has no 'weight_map'"),
        (b"[]", "has no 'weight_map'"),
        (b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', "the key 'a' appears twice"),
        (b"not json", "this is no usable JSON"),
        (b"[" * 100_000, "this is no usable JSON"),
        (
            {"a": "1.safetensors", "c": "1.safetensors"},
            "tensor 'c': says it is in 1.safetensors, which does not have it",
        ),
        ({"a": "2.safetensors"}, "tensor 'a': says it is in 2.safetensors, which does not have it"),
    ],
)
def test_an_index_that_lies_is_refused_by_entry(weight_map: dict | bytes, words: str, tmp_path: Path) -> None:
    sharded(tmp_path, weight_map, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    with pytest.raises(WeightsError) as caught:
        model_headers(tmp_path)
    assert words in str(caught.value)


def test_a_tensor_in_two_files_is_refused_naming_both(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"], "2.safetensors": ["a"]})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="tensor 'a' is in 1.safetensors too"):
        model_headers(tmp_path)


def test_a_huge_index_or_configuration_is_refused_by_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(WeightsError, match="1,048,577 bytes are more than the 1,048,576 allowed"):
        read_json(path)


def test_shards_are_found_through_the_index_or_the_folder(tmp_path: Path) -> None:
    index = sharded(
        tmp_path,
        {"a": "2.safetensors", "b": "1.safetensors"},
        {"1.safetensors": ["b"], "2.safetensors": ["a", "left over"]},
    )
    shards = (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert model_files(index) == model_files(tmp_path) == shards
    assert weights_bytes(tmp_path) == weights_bytes(index) == 12
    (tmp_path / "model.safetensors").write_bytes(file_of({"a": entry()}, b"abcd"))
    assert model_files(tmp_path) == (tmp_path / "model.safetensors",)
    assert weights_bytes(tmp_path) == 4


def test_a_linked_shard_is_followed_as_model_caches_need(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(file_of({"a": entry()}, b"abcd"))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert weights_bytes(folder) == 4


def test_sizes_follow_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"f": entry((2,), 0, 8, "F32"), "i": entry((1,), 8, 16, "I64")}, bytes(16)))
    assert weights_bytes(path) == weights_bytes(path, dtype="auto") == 16
    assert weights_bytes(path, dtype="bfloat16") == 12


def test_the_parts_of_a_model_folder_are_summed(tmp_path: Path) -> None:
    for folder, tensor in (("", "a"), ("2_Dense", "linear.weight")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "model.safetensors").write_bytes(file_of({tensor: entry()}, b"abcd"))
    modules = [{"path": "", "type": "x"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert weights_bytes(tmp_path) == 8
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../../etc"}]))
    with pytest.raises(WeightsError, match="outside the folder"):
        weights_bytes(tmp_path)
