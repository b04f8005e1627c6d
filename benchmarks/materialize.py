"""How fast a dispatched model is made whole, and how much memory that takes, next to plain reads of the same bytes.

    python benchmarks/materialize.py                 # a table; exit code 1 when a figure is missed
    python benchmarks/materialize.py --write NAME    # also benchmarks/results/NAME.md

Every measurement has a process of its own, forked from one that has only imported: it dispatches the model, gives free
heap memory back, and then does one thing once, into memory that it has never touched. The methods take turns, and who
begins changes from round to round. The files are in the page cache. Times are medians; the dispatch is not in them. A
ratio is the median of the ratios of each round, so that a busy machine slows both sides of it.
Peak memory is the high-water mark of the process above what it had before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import statistics
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import plots
import torch
import transformers
from accelerate.utils import offload_state_dict
from figures import Figure, present, spread
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modelcache import materialize_meta_tensors

ROUNDS = 7
NUM_LAYERS, NUM_IN_RAM = 10, 2
NUM_SMALL = 4_000
RATIO, PEAK, SMALL_S = 1.3, 1.1, 0.5

Method = Callable[[torch.nn.Module], object]


@dataclass(frozen=True)
class Range:
    path: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Case:
    """A model to dispatch, and where the bytes are that its dispatch leaves in files."""

    what: str
    dispatch: Callable[[], torch.nn.Module]
    ranges: Sequence[Range]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.ranges)

    def flat(self, model: torch.nn.Module) -> object:
        """The bytes in the order of the files, into one piece of fresh memory, with as few calls as there are gaps."""
        memory = torch.empty(self.size_bytes, dtype=torch.uint8)
        view, done = memory.numpy().data, 0
        for path, ranges in by_file(self.ranges).items():
            descriptor = os.open(path, os.O_RDONLY)
            for each in ranges:
                end = done + each.size_bytes
                offset = each.offset
                while done < end:
                    count = os.preadv(descriptor, [view[done:end]], offset)
                    done, offset = done + count, offset + count
            os.close(descriptor)
        return memory

    def cloned(self, model: torch.nn.Module) -> object:
        """What most would write: the files opened with safetensors, and a copy of every tensor that is wanted."""
        kept: dict[str, torch.Tensor] = {}
        for path, names in self.files.items():
            tensors = load_file(path)
            kept |= {name: tensors[name].clone() for name in names}
        return kept


def by_file(ranges: Sequence[Range]) -> dict[str, list[Range]]:
    """Neighbours united."""
    found: dict[str, list[Range]] = {}
    for each in sorted(ranges, key=lambda each: (each.path, each.offset)):
        of_file = found.setdefault(each.path, [])
        if of_file and of_file[-1].offset + of_file[-1].size_bytes == each.offset:
            before = of_file.pop()
            of_file.append(Range(each.path, before.offset, before.size_bytes + each.size_bytes))
        else:
            of_file.append(each)
    return found


def header_of(path: Path) -> dict[str, Range]:
    """The places of a safetensors file, read without the code that is measured."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    begin = 8 + size
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: Range(str(path), begin + start, end - start) for name, (start, end) in places.items()}


def in_child(work: Callable[[], object]) -> Any:
    """What `work` answers in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError("the measured process failed; its error is above")
    return json.loads(answer)


def memory_of_process(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024


def measured(case: Case, method: Method) -> tuple[float, int]:
    """Seconds, and the peak of resident memory above the start; to be called in a child."""
    torch.set_num_threads(1)
    model = case.dispatch()
    gc.collect()
    # Memory that is free in the heap could be used again without showing in the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    start_bytes = memory_of_process("VmRSS")
    began = time.perf_counter()
    kept = method(model)
    seconds = time.perf_counter() - began
    peak_bytes = memory_of_process("VmHWM") - start_bytes
    del kept
    return seconds, peak_bytes


def ours(num_workers: int) -> Method:
    return lambda model: materialize_meta_tensors(model, num_workers=num_workers)


def check(case: Case, expected: Path) -> None:
    """Every tensor of the model made whole is that of the checkpoint, bit for bit."""

    def compare() -> int:
        tensors = materialize_meta_tensors(case.dispatch()).state_dict()
        stored = {
            name: value for path in sorted(expected.glob("*.safetensors")) for name, value in load_file(path).items()
        }
        assert stored.keys() == tensors.keys()
        different = [name for name, value in stored.items() if not torch.equal(tensors[name], value)]
        assert not different, different
        return len(tensors)

    in_child(compare)


def rounds(case: Case, methods: Mapping[str, Method]) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in methods}
    names = list(methods)
    for number in range(ROUNDS):
        for path in by_file(case.ranges):
            with open(path, "rb") as file:
                while file.read(16 << 20):
                    pass
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(tuple(in_child(lambda name=name: measured(case, methods[name]))))
    return found


def compared(case: Case) -> list[Figure]:
    """A large model: time and memory."""
    methods: dict[str, Method] = {"ours": ours(4), "ours, one thread": ours(1), "flat": case.flat}
    if case.files:
        methods["load_file"] = case.cloned
    found = rounds(case, methods)
    times = {name: [seconds * 1e3 for seconds, _ in pairs] for name, pairs in found.items()}
    flat = statistics.median(times["flat"])
    figures = []
    for name, suffix in (("ours", ""), ("ours, one thread", ", num_workers=1"), ("load_file", "")):
        if name not in times:
            continue
        median = statistics.median(times[name])
        ratio = statistics.median(each / beside for each, beside in zip(times[name], times["flat"], strict=True))
        limit = RATIO if name != "load_file" else None
        figures.append(
            Figure(
                f"materialize {case.what}{suffix}" if limit else f"load_file and clone {case.what}",
                f"{median:.0f} ms",
                f"{flat:.0f} ms (flat preadv, {spread(times['flat'])})",
                f"{ratio:.2f}",
                f"<= {limit}" if limit else "shown",
                limit is None or ratio <= limit,
                f"{spread(times[name])} ms",
                tuple(times[name]),
            )
        )
    figures.append(
        Figure(
            f"flat preadv {case.what}",
            f"{flat:.0f} ms",
            "-",
            "-",
            "shown",
            True,
            f"{spread(times['flat'])} ms",
            tuple(times["flat"]),
        )
    )
    peaks = {name: [peak / case.size_bytes for _, peak in pairs] for name, pairs in found.items()}
    peak = max(peaks["ours"])
    beside = [f"{statistics.median(peaks[name]):.2f} ({name})" for name in ("flat", "load_file") if name in peaks]
    figures.append(
        Figure(
            f"peak RSS above the start, {case.what}",
            f"{peak:.3f} x bytes",
            ", ".join(beside),
            "-",
            f"<= {PEAK} x bytes",
            peak <= PEAK,
            f"{min(peaks['ours']):.3f} to {peak:.3f}",
            tuple(peaks["ours"]),
        )
    )
    return figures


def many_small(case: Case) -> Figure:
    found = rounds(case, {"ours": ours(4), "flat": case.flat})
    times, flat = ([seconds for seconds, _ in found[name]] for name in ("ours", "flat"))
    median = statistics.median(times)
    return Figure(
        f"materialize {case.what}",
        f"{median:.3f} s",
        f"{statistics.median(flat):.3f} s (flat preadv)",
        "-",
        f"<= {SMALL_S} s",
        median <= SMALL_S,
        f"{spread(times)} s",
        tuple(times),
    )


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=1408,
        intermediate_size=3840,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=11,
        num_key_value_heads=11,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def save_llama(folder: Path) -> None:
    def save() -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(llama()).save_pretrained(folder, max_shard_size="150MB")

    in_child(save)


def sharded(folder: Path, offload: Path) -> Case:
    """The model as transformers dispatches it: the part on disk stays in the checkpoint's own shards."""
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    parts |= {f"model.layers.{i}": "cpu" if i < NUM_IN_RAM else "disk" for i in range(NUM_LAYERS)}
    on_disk = tuple(f"{part}." for part, place in parts.items() if place == "disk")
    shards = sorted(folder.glob("*.safetensors"))
    wanted = {path: {n: r for n, r in header_of(path).items() if n.startswith(on_disk)} for path in shards}
    size_bytes = sum(each.size_bytes for found in wanted.values() for each in found.values())
    whole_bytes = sum(each.size_bytes for path in shards for each in header_of(path).values())
    count = sum(map(len, wanted.values()))
    return Case(
        f"{size_bytes / 1e6:.0f} of {whole_bytes / 1e6:.0f} MB, {count} tensors in {len(shards)} safetensors shards",
        lambda: LlamaForCausalLM.from_pretrained(folder, device_map=dict(parts), offload_folder=str(offload)),
        [each for found in wanted.values() for each in found.values()],
        {str(path): tuple(found) for path, found in wanted.items() if found},
    )


def as_dat(folder: Path, checkpoint: Path) -> Case:
    """The same model, all of it in the files that accelerate writes, one for each tensor."""

    def save() -> None:
        offload_state_dict(
            folder, {n: t for path in checkpoint.glob("*.safetensors") for n, t in load_file(path).items()}
        )

    in_child(save)
    return dat_case(folder, lambda: LlamaForCausalLM(llama()))


def dat_case(folder: Path, make: Callable[[], torch.nn.Module]) -> Case:
    def dispatch() -> torch.nn.Module:
        with accelerate.init_empty_weights():
            model = make()
        return accelerate.dispatch_model(model.to(torch.bfloat16), {"": "disk"}, offload_dir=folder, force_hooks=True)

    ranges = [Range(str(path), 0, path.stat().st_size) for path in sorted(folder.glob("*.dat"))]
    size_bytes = sum(each.size_bytes for each in ranges)
    return Case(f"{size_bytes / 1e6:.0f} MB, {len(ranges)} tensors in .dat files", dispatch, ranges)


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(
        *(torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(NUM_SMALL // 100))) for _ in range(50))
    )


def small(folder: Path) -> tuple[Case, Case]:
    """A model of many tensors, in one safetensors file and in as many ``.dat`` files."""
    path, dat_folder = folder / "model.safetensors", folder / "dat"

    def save() -> None:
        tensors = small_model().to(torch.bfloat16).state_dict()
        save_file(tensors, path)
        offload_state_dict(dat_folder, tensors)

    in_child(save)
    places = header_of(path)
    index = {name: {"safetensors_file": str(path), "weight_name": name, "dtype": "bfloat16"} for name in places}

    def dispatch() -> torch.nn.Module:
        with accelerate.init_empty_weights():
            model = small_model().to(torch.bfloat16)
        return accelerate.dispatch_model(model, {"": "disk"}, offload_dir=folder, offload_index=index, force_hooks=True)

    size_bytes = sum(each.size_bytes for each in places.values())
    what = f"{size_bytes / 1e6:.0f} MB, {len(places)} small tensors in one safetensors file"
    return Case(what, dispatch, list(places.values()), {str(path): tuple(places)}), dat_case(dat_folder, small_model)


def measure() -> list[Figure]:
    # Said at every dispatch, of which there are many here.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint, tiny = root / "checkpoint", root / "small"
        tiny.mkdir()
        save_llama(checkpoint)
        shards, dat = sharded(checkpoint, root / "offload"), as_dat(root / "dat", checkpoint)
        in_one, in_many = small(tiny)
        check(shards, checkpoint)
        check(dat, checkpoint)
        check(in_one, tiny)
        check(in_many, tiny)
        return [*compared(shards), *compared(dat), many_small(in_one), many_small(in_many)]


if __name__ == "__main__":
    sys.exit(present("materialize.py", __doc__, measure, notes=__doc__.split("\n\n", 2)[2].strip(), plot=plots.ratios))
