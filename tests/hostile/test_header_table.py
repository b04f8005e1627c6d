"""The table of attacks on headers, H01 to H24: all there, refused in words that help, and never read more laxly.

The attacks themselves are in `test_headers.py`. Here they meet safetensors: whatever is accepted by both has the same
bytes in both, and what safetensors accepts beyond that is a list that does not grow by itself.
"""

from __future__ import annotations

import os
import struct

import pytest
import safetensors
from test_headers import ATTACKS, entry, file_of

from modelcache.errors import WeightsError
from modelcache.headers import read_header

NUMBERS = [f"H{number:02}" for number in range(1, 25)]
ACCEPTED = {
    "H22 names like paths, which they are not": file_of(
        {"../x": entry((1,), 0, 1), "/etc/passwd": entry((1,), 1, 2), "C:\\x": entry((2,), 2, 4)}, b"abcd"
    ),
    "H22 a name of 1,024 bytes": file_of({"é" * 512: entry()}, b"abcd"),
    "H23 four values of four bits": file_of({"a": entry((4,), 0, 2, "F4")}, b"ab"),
    "H24 not a number": file_of({"a": entry((2,), 0, 8, "F32")}, struct.pack("<2f", float("nan"), float("-inf"))),
    "H19 the largest dimension": file_of({"a": entry((0, 2**48), 0, 0)}),
    "H18 the highest rank": file_of({"a": entry((1,) * 32, 0, 4, "F32")}, b"abcd"),
    "H21 metadata that looks like a tensor": file_of({"__metadata__": {"dtype": "U8", "shape": "[4]"}}),
    "no tensors": file_of(b"{}"),
    "out of order": file_of({"b": entry((2,), 2, 4), "a": entry((2,), 0, 2)}, b"abcd"),
    "spaces after": file_of(b"{}" + b" " * 100),
}
#: What safetensors 0.8 reads, and is refused here: readers disagree on it, or it takes a lot of them.
LAXER = {
    "H06 leading space",
    "H06 leading newline",
    "H10 duplicate name",
    "H10 duplicate name, spelled otherwise",
    "H11 unknown inner key",
    "H18 rank 100,000",
    "H18 rank 33",
    "H19 dimension above 2^48",
    "H21 metadata above 1 MiB",
    "H21 metadata above 1 MiB in many keys",
    "H21 metadata above 1 MiB in UTF-8",
    "H21 a metadata key twice",
    "H22 NUL",
    "H22 newline",
    "H22 ANSI escape",
    "H22 right-to-left override",
    "H22 empty name",
    "H22 name of 1 MB",
    "H22 name of 1,025 bytes",
    "H22 name of 1,026 bytes in 513 letters",
}


def theirs(content: bytes) -> dict[str, dict] | None:
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None


def test_every_attack_of_the_table_is_there(figure):
    have = [*ATTACKS, *ACCEPTED]
    missing = [number for number in NUMBERS if not any(name.startswith(number) for name in have)]
    assert missing == []
    figure("header attacks", "refused in words", len(ATTACKS))
    figure("header attacks", "harmless, and read as safetensors reads them", len(ACCEPTED))


def test_safetensors_accepts_no_attack_but_those_that_are_known():
    assert {name for name, (content, _) in ATTACKS.items() if theirs(content) is not None} <= LAXER
    assert LAXER <= ATTACKS.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_refusal_names_the_file_the_place_and_what_to_do(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(ATTACKS[name][0])
    with pytest.raises(WeightsError) as caught:
        read_header(path, name="m")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert message.endswith((".", "known: dtype, shape, data_offsets. Not loaded."))
    assert len(message) < len(str(path)) + 1500


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_has_the_bytes_that_safetensors_reads(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(ACCEPTED[name])
    mine, other = read_header(path), theirs(ACCEPTED[name])
    assert other is not None
    assert mine.tensors.keys() == other.keys()
    for tensor, found in mine.tensors.items():
        assert (found.dtype, list(found.shape)) == (other[tensor]["dtype"], list(other[tensor]["shape"]))
        assert ACCEPTED[name][found.begin : found.end] == bytes(other[tensor]["data"])


def test_nothing_is_mapped_and_nothing_before_the_length_is_known(tmp_path, monkeypatch):
    """Only `pread`, and of a file that claims too much no more than its beginning."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(b"{}", length=2**40))
    asked: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        asked.append((size, offset))
        return pread(descriptor, size, offset)

    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("only pread reads a header")

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "read", forbidden)
    monkeypatch.setattr("mmap.mmap", forbidden)
    with pytest.raises(WeightsError, match="the header claims"):
        read_header(path)
    assert asked == [(10, 0)]
