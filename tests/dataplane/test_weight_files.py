"""Tensors are found in files by their headers and sizes, with the file's identity, and what cannot be found is told."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelcache.dataplane.files import weight_files
from modelcache.dataplane.files.weight_files import (
    FileBytes,
    FileProblemError,
    Headers,
    find_dat,
    index_of,
    torch_dtype,
)
from modelcache.header_grammar import BITS_OF, TensorEntry
from modelcache.headers import FileIdentity, read_header


def written(path: Path, dtype: str, num_bytes: int) -> Path:
    body = b'{"a":{"dtype":"%s","shape":[4],"data_offsets":[0,%d]}}' % (dtype.encode(), num_bytes)
    path.write_bytes(len(body).to_bytes(8, "little") + body + bytes(num_bytes))
    return path


def test_every_dtype_of_whole_bytes_that_a_header_may_have_is_one_of_torch_of_the_same_size():
    for code, bits in BITS_OF.items():
        dtype = torch_dtype(TensorEntry(code, (1,), 0, bits // 8))
        if dtype is None:
            assert bits % 8, code
        else:
            assert dtype.itemsize * 8 == bits, code


def test_a_tensor_is_found_with_its_place_and_the_identity_of_its_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int16)}, path)
    entry, identity = read_header(path).tensors["b"], FileIdentity.of(path.stat())
    found = Headers().find(str(path), "b", torch.float32)
    assert found == FileBytes(str(path), entry.begin, torch.int16, (4,), torch.float32, identity)
    assert found.size_bytes == 8


def test_a_header_is_read_once_also_when_it_is_bad(tmp_path, monkeypatch):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, good)
    bad.write_bytes(b"")
    read: list[str] = []

    def counted(path):
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(weight_files, "read_header", counted)
    headers = Headers()
    for name in ("a", "b"):
        headers.find(str(good), name, None)
        with pytest.raises(FileProblemError, match="bad.safetensors: the file is empty"):
            headers.find(str(bad), name, None)
    assert read == [str(good), str(bad)]


def test_what_a_file_does_not_have_or_torch_cannot_hold_is_named(tmp_path):
    path = str(written(tmp_path / "m.safetensors", "F4", 2))
    with pytest.raises(FileProblemError, match=r"m\.safetensors has no tensor 'z'"):
        Headers().find(path, "z", None)
    with pytest.raises(FileProblemError, match=r"m\.safetensors has 'a' as F4, which torch cannot hold plainly"):
        Headers().find(path, "a", None)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_the_rarer_floats_of_eight_bits_are_found_too(tmp_path, dtype):
    assert Headers().find(str(written(tmp_path / "m.safetensors", dtype, 4)), "a", None).size_bytes == 4


def test_a_dat_file_must_be_a_file_of_the_size_of_its_tensor(tmp_path):
    path = tmp_path / "w.dat"
    path.write_bytes(bytes(24))
    assert find_dat(str(path), torch.float32, (2, 3)).identity == FileIdentity.of(path.stat())
    with pytest.raises(FileProblemError, match=r"w\.dat has 24 bytes, its index says 28"):
        find_dat(str(path), torch.float32, (7,))
    with pytest.raises(FileProblemError, match=r"the index of .*w\.dat gives no dtype that torch knows"):
        find_dat(str(path), None, (6,))
    with pytest.raises(FileProblemError, match=r"cannot read .*z\.dat: No such file"):
        find_dat(str(tmp_path / "z.dat"), torch.float32, (6,))
    os.mkfifo(tmp_path / "pipe.dat")
    with pytest.raises(FileProblemError, match=r"pipe\.dat is not a regular file"):
        find_dat(str(tmp_path / "pipe.dat"), torch.float32, (6,))


def test_a_dat_file_for_no_elements_may_have_bytes(tmp_path):
    path = tmp_path / "w.dat"
    path.write_bytes(b"\0")
    assert find_dat(str(path), torch.float32, (0, 3)).size_bytes == 0


def test_a_folder_is_indexed_file_by_file(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.ones(1)}, one)
    save_file({"b": torch.ones(1)}, two)
    (tmp_path / "notes.txt").write_text("no weights")
    assert index_of(tmp_path, Headers()) == {
        "a": {"safetensors_file": str(one), "weight_name": "a"},
        "b": {"safetensors_file": str(two), "weight_name": "b"},
    }
    two.write_bytes(b"")
    with pytest.raises(FileProblemError, match=r"2\.safetensors: the file is empty"):
        index_of(tmp_path, Headers())
