"""What hostile model folders are made of, and how one is described: what lies in it, who loads it, what must come of it.

A case has a builder that fills an empty folder, and the words of the refusal, or `LOADED` when the folder is harmless
and must be loaded as it is. Payloads do something that leaves a mark: they write the file `MARK` beside all folders.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LOADED = "loaded"
MARK = "payload_ran"
MARKER = "payload_of_the_hostile_folder"

Build = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """One folder.

    Attributes:
        family: The kind of attack, for the table of figures.
        loader: The named loader it is given to; ``config`` for the file ``modelcache.yaml`` in it.
        build: Fills the folder; the second path has the folders ``transformers`` and ``sentence-transformers`` to copy.
        outcome: `LOADED`, or words of the error.
        options: More options of the registration.
        weights: What of the folder is named as weights, for the loader ``safetensors``.
    """

    family: str
    loader: str
    build: Build
    outcome: str
    options: Mapping[str, object] | None = None
    weights: str = ""


CASES: dict[str, Case] = {}


def case(name: str, loader: str, outcome: str, family: str = "", **more: object) -> Callable[[Build], Build]:
    """Register the decorated builder as a case."""

    def register(build: Build) -> Build:
        full = f"{loader}: {name}"
        assert full not in CASES
        CASES[full] = Case(family or f"folders for {loader}", loader, build, outcome, **more)
        return build

    return register


# ------------------------------------------------------------------------------------------------------- contents


def safetensors_bytes(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A good file."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    body = json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + b"".join(data for _, _, data in tensors.values())


GOOD = safetensors_bytes({"a": ("F32", [2, 2], struct.pack("<4f", 1, 2, 3, 4))})
HALF = safetensors_bytes({"b": ("F32", [2], struct.pack("<2f", 5, 6))})


class Payload:
    """Unpickling it runs code."""

    def __init__(self, folder: Path) -> None:
        self.code = f"# {MARKER}\nopen({str(folder.parent / MARK)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder), protocol=4)


def torch_zip(folder: Path) -> bytes:
    """As torch.save writes it, with a payload."""
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
        archive.writestr("archive/version", "3\n")
    return into.getvalue()


def payload_module(folder: Path, name: str = "payload.py") -> None:
    """A module that marks its import."""
    (folder / name).write_text(
        f"# {MARKER}\nopen({str(folder.parent / MARK)!r}, 'w').close()\n"
        "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )


def copied(kind: str) -> Build:
    """Only the good folder."""

    def build(folder: Path, good: Path) -> None:
        shutil.copytree(good / kind, folder, dirs_exist_ok=True)

    return build


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
