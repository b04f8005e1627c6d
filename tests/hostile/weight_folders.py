"""Hostile folders of weights alone: headers, other things in their place, and indexes that lie."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
from pathlib import Path

from hostile.contents import GOOD, HALF, LOADED, Payload, case, payload_module, pickled, safetensors_bytes, torch_zip
from test_headers import ATTACKS

# ------------------------------------------------------------------------------------- every attack on a header

for _name, (_content, _words) in ATTACKS.items():

    @case(f"a header: {_name}", "safetensors", _words, "headers", weights="model.safetensors")
    def _(folder: Path, _good: Path, content=_content) -> None:
        (folder / "model.safetensors").write_bytes(content)


# ----------------------------------------------------------------------------------- one file, or what is in its place

for _name, _content, _words in [
    ("a pickle", pickled, "this is a pickle (starts with 80 04)"),
    ("a pickle of protocol 2", lambda folder: pickle.dumps(Payload(folder), protocol=2), "this is a pickle"),
    ("a pickle of protocol 0", lambda folder: pickle.dumps(Payload(folder), protocol=0), "claims"),
    ("an archive of torch.save", torch_zip, "this is a ZIP archive as torch.save writes it"),
    (
        "a pointer",
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a Git LFS pointer",
    ),
    ("a web page", lambda _: b"<!DOCTYPE html><html>404</html>", "the download saved an error page"),
    ("an error in XML", lambda _: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an error page"),
    ("an error in JSON", lambda _: b'{"error":"gated"}', "this is JSON, not weights"),
    ("a model of llama.cpp", lambda _: b"GGUF\x03\0\0\0" + bytes(64), "this is a GGUF file"),
    ("an array of numpy", lambda _: b"\x93NUMPY\x01\0" + bytes(64), "this is no safetensors file"),
    ("compressed", lambda _: b"\x1f\x8b\x08\0\x5e\x0a\xf1\x65" + bytes(64), "this is no safetensors file"),
    ("a shell script", lambda _: b"#!/bin/sh\nrm -rf ~\n", "the header claims"),
    ("nothing", lambda _: b"", "the file is empty"),
    ("weights and an archive", lambda folder: GOOD + torch_zip(folder), "bytes follow the last tensor"),
    ("half of its weights", lambda _: GOOD[:-8], "The download is incomplete"),
]:

    @case(
        f"{_name} for a file of weights", "safetensors", _words, "contents of another kind", weights="model.safetensors"
    )
    def _(folder: Path, _good: Path, content=_content) -> None:
        (folder / "model.safetensors").write_bytes(content(folder))


@case("good weights", "safetensors", LOADED, weights="model.safetensors")
def _(folder: Path, _good: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)


@case("good weights, found in their folder beside a pickle", "safetensors", LOADED)
def _(folder: Path, _good: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "pytorch_model.bin").write_bytes(torch_zip(folder))
    payload_module(folder, "modeling.py")


@case("a folder with the name of weights", "safetensors", "a folder, not a regular file")
def _(folder: Path, _good: Path) -> None:
    (folder / "model.safetensors").mkdir()


@case("a link to good weights", "safetensors", LOADED)
def _(folder: Path, _good: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "blobs" / "0123").write_bytes(GOOD)
    (folder / "model.safetensors").symlink_to(Path("blobs") / "0123")


@case("weights that are not finite", "safetensors", LOADED)
def _(folder: Path, _good: Path) -> None:
    nan = safetensors_bytes({"a": ("F32", [2, 2], struct.pack("<4f", float("nan"), float("inf"), -0.0, 1))})
    (folder / "model.safetensors").write_bytes(nan)


@case("only a pickle", "safetensors", "pytorch_model.bin (pickle, not loaded)")
def _(folder: Path, _good: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(torch_zip(folder))


@case("a pickle, named", "safetensors", "a pickle by its name", weights="weights.pt")
def _(folder: Path, _good: Path) -> None:
    (folder / "weights.pt").write_bytes(GOOD)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    back = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(path.parent)  # the name of a socket has to be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.fchdir(back)
        os.close(back)


for _name, _make, _words in [
    ("a pipe", _fifo, "a named pipe, not a regular file"),
    ("a socket", _socket, "a socket, not a regular file"),
    ("a folder", Path.mkdir, "The folder is empty"),
    ("a link to a device", lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
    ("a link to what the kernel makes up", lambda path: path.symlink_to("/proc/self/environ"), "the file is empty"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "cannot be opened"),
    ("a link to nothing", lambda path: path.symlink_to("nowhere"), "no file"),
    ("a link into a circle of folders", lambda path: path.symlink_to("."), "a folder, not a regular file"),
]:

    @case(f"{_name} for a file of weights", "safetensors", _words, "no files at all", weights="model.safetensors")
    def _(folder: Path, _good: Path, make=_make) -> None:
        make(folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------- indexes of shards


def _indexed(folder: Path, content: object, raw: bytes | None = None) -> None:
    (folder / "model-1.safetensors").write_bytes(GOOD)
    (folder.parent / "outside.safetensors").write_bytes(HALF)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(raw if raw is not None else json.dumps(content).encode())


for _name, _shard, _words in [
    ("above the folder", "../outside.safetensors", "outside its folder"),
    ("from the root", "/etc/outside.safetensors", "outside its folder"),
    ("with strokes of Windows", "..\\outside.safetensors", "outside its folder"),
    ("on a drive", "C:\\outside.safetensors", "outside its folder"),
    ("in a folder below", "sub/model.safetensors", "outside its folder"),
    ("hidden", ".hidden.safetensors", "outside its folder"),
    ("with a NUL", "model\0.safetensors", "is no .safetensors file"),
    ("with a line end", "model\n.safetensors", "is no .safetensors file"),
    ("that is written backwards", "model\u202e.safetensors", "is no .safetensors file"),
    ("of 300 letters", "m" * 300 + ".safetensors", "is no .safetensors file"),
    ("that is a pickle", "pytorch_model.bin", "is no .safetensors file"),
    ("that is a number", 7, "is no .safetensors file"),
    ("that is missing", "model-2.safetensors", "shard 'model-2.safetensors' is missing"),
    ("of another alphabet", "mоdel-1.safetensors", "is missing"),
]:

    @case(f"an index with a shard {_name}", "safetensors", _words, "indexes")
    def _(folder: Path, _good: Path, shard=_shard) -> None:
        _indexed(folder, {"weight_map": {"a": "model-1.safetensors", "b": shard}})


for _name, _raw, _words in [
    ("that is no JSON", b"{", "no usable JSON"),
    ("that is a list", b"[]", "has no 'weight_map'"),
    ("without files", b'{"weight_map":{}}', "has no 'weight_map'"),
    ("that says a tensor twice", b'{"weight_map":{"a":"model-1.safetensors","a":"x.safetensors"}}', "appears twice"),
    ("nested deeply", b'{"weight_map":' + b"[" * 50_000, "no usable JSON"),
    ("that is a pickle", b"\x80\x04K\x01.", "no usable JSON"),
    ("above its cap", b" " * (16 * 2**20 + 1), "are more than the"),
    ("that puts a tensor elsewhere", b'{"weight_map":{"z":"model-1.safetensors"}}', "which does not have it"),
]:

    @case(f"an index {_name}", "safetensors", _words, "indexes")
    def _(folder: Path, _good: Path, raw=_raw) -> None:
        _indexed(folder, None, raw)


@case("a good index", "safetensors", LOADED, "indexes")
def _(folder: Path, _good: Path) -> None:
    _indexed(folder, {"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors"}})


@case("an index that is a pipe", "safetensors", "a named pipe", "indexes")
def _(folder: Path, _good: Path) -> None:
    os.mkfifo(folder / "model.safetensors.index.json")


@case("two shards with the same tensor", "safetensors", "is in model-1.safetensors too", "indexes")
def _(folder: Path, _good: Path) -> None:
    _indexed(folder, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    (folder / "model-2.safetensors").write_bytes(GOOD)
