"""Run as a program: loads every hostile folder under an audit hook, and prints what came of each, and what it tried.

An audit hook cannot be removed, so this is a process of its own, for all folders at once. Everything that an honest load
imports is imported by two honest loads before the hook watches.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT, GOOD = Path(sys.argv[1]), Path(sys.argv[2])
# The worst that a program can do: folders of models are packages that can be imported.
sys.path[:0] = [str(ROOT), str(TESTS)]
warnings.simplefilter("ignore")

import torch  # noqa: E402 - see above
from hostile.folders import CASES, LOADED, MARK, MARKER, Case, payload_module, pickled  # noqa: E402

import modelcache  # noqa: E402

NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"}
NEVER |= {"pickle.find_class", "webbrowser.open", "urllib.Request", "shutil.rmtree"}
NEVER |= {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
NEVER |= {"os.remove", "os.rename", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.putenv"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

BAIT = {"antigravity", "this"}  # modules that everybody has and nobody imports

seen: list[str] = []
watching = False


def spied(load):
    """`torch.load`, which tells of itself: what it unpickles with `weights_only` passes no hook."""

    def torch_load(file, *args, **kwargs):
        if watching:
            seen.append(f"torch.load {file!r}"[:300])
        return load(file, *args, **kwargs)

    return torch_load


torch.load = spied(torch.load)


def inside(path: object) -> bool:
    """Whether a path is in a hostile folder."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return text.startswith(str(ROOT))


def foreign(event: str, args: tuple[object, ...]) -> bool:
    """Whether no load may do this."""
    if event in NEVER or event.startswith(("ftplib", "http.client", "smtplib")):
        return True
    if event == "ctypes.dlopen":
        return args[0] is not None  # nothing but the process itself
    if event == "exec":
        return inside(getattr(args[0], "co_filename", "")) or MARKER in str(getattr(args[0], "co_consts", ""))
    if event == "compile":
        return inside(args[1]) or MARKER in str(args[0])
    if event == "import":
        return inside(args[1]) or str(args[0]).split(".")[0] in {*BAIT, "payload", *os.listdir(ROOT)}
    if event == "open":
        path, flags = args[0], args[2]
        written = isinstance(flags, int) and flags & WRITES and not isinstance(path, int)
        return bool(written) and os.fsdecode(path) not in {"/dev/null", os.devnull}
    return False


def hook(event: str, args: tuple[object, ...]) -> None:
    global watching
    if watching:
        watching = False  # what the look itself does is not looked at
        try:
            if foreign(event, args):
                seen.append(f"{event} {args!r}"[:300])
        finally:
            watching = True


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2, 2))


def watched(function):
    """Call it under the eyes of the hook, in every thread."""
    global watching
    seen.clear()
    watching = True
    try:
        return function()
    finally:
        watching = False
        # importlib does not tell a hook what it is asked for, only what is executed: so by what is there afterwards.
        seen.extend(f"import of {name}" for name in sorted(BAIT & sys.modules.keys()))


def prints(tensors) -> dict[str, str]:
    """What bytes there are, by name."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def is_right(case: Case, model: torch.nn.Module, folder: Path) -> bool:
    """Whether the model has the bytes of its files, read by safetensors itself."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    name = next(iter(json.loads(index.read_text())["weight_map"].values())) if index.exists() else "model.safetensors"
    want = prints(load_file(folder / name))
    model = model if isinstance(model, torch.nn.Module) else model.model  # of a pipeline
    have = prints(dict(model.state_dict()))
    if case.loader == "sentence-transformers":
        have = {name.removeprefix("0.model.").removeprefix("0.auto_model."): each for name, each in have.items()}
    have = {name.replace(".base_layer", ""): each for name, each in have.items()}  # beneath an adapter
    return want.items() <= have.items()


def load(cache: modelcache.ModelCache, name: str, case: Case, folder: Path) -> dict[str, object]:
    """Give the folder to the public surface, once, and tell what came of it."""
    if case.loader == "config":
        register = None
    elif case.loader == "safetensors":
        register = {"model": Small, "weights": str(folder / case.weights)}
    else:
        register = {"path": str(folder / case.weights), **(case.options or {})}

    def attempt() -> object:
        if register is None:
            return modelcache.load_config(str(folder / "modelcache.yaml"))
        cache.register(name, loader=case.loader, **register)
        return modelcache.unwrap(cache.get(name, timeout=60))

    right = False
    try:
        model = watched(attempt)
    except modelcache.ModelCacheError as error:
        outcome, message = type(error).__name__, str(error)
    except BaseException as error:  # an error of another kind is a failure, which the test reports
        outcome, message = f"unexpected {type(error).__name__}", str(error)
    else:
        outcome, message, right = LOADED, "", case.loader == "config" or is_right(case, model, folder)
    tried = list(seen)
    if name in cache.names():
        cache.unregister(name)
    return {"outcome": outcome, "message": message, "right": right, "tried": tried, "ran": (ROOT / MARK).exists()}


def make_good(good: Path) -> None:
    """The folders that attacks are made from."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    plain = good / "transformers"
    BertModel(BertConfig(**sizes, vocab_size=16, max_position_embeddings=8)).save_pretrained(plain)
    vocabulary = good / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(plain)
    part = Transformer(str(plain))
    SentenceTransformer(modules=[part, Pooling(8)], device="cpu").save(str(good / "sentence-transformers"))


def tried_by_itself() -> dict[str, list[str]]:
    """Everything that no folder may do, done on purpose: what the hook saw of each."""
    folder = ROOT / "on_purpose"
    folder.mkdir()
    payload_module(folder)
    source = (folder / "payload.py").read_text()
    torch.save(torch.zeros(1), ROOT / "tensor.pt")
    attempts = {
        "pickle": lambda: pickle.loads(pickled(folder)),
        "torch": lambda: torch.load(ROOT / "tensor.pt"),
        "exec": lambda: exec(compile(source, str(folder / "payload.py"), "exec"), {}),
        "source": lambda: compile(source, "<string>", "exec"),
        "import": lambda: importlib.import_module("on_purpose.payload"),
        "library": lambda: importlib.import_module("this"),
        "subprocess": lambda: subprocess.run(["true"], check=True),
        "system": lambda: os.system("true"),
        "socket": lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
        "name": lambda: socket.getaddrinfo("localhost", 9),
        "write": lambda: (ROOT / "written").write_text("x"),
        "library in C": lambda: ctypes.CDLL("libc.so.6"),
        "remove": lambda: (ROOT / "written").unlink(),
    }
    found = {}
    for name, attempt in attempts.items():
        with contextlib.redirect_stdout(io.StringIO()):
            watched(attempt)
        found[name] = list(seen)
    return found


def main() -> None:
    GOOD.mkdir()
    make_good(GOOD)
    results: dict[str, object] = {}
    with modelcache.ModelCache(device="host_only", ram="256MiB", progress=False) as cache:
        for number, (name, case) in enumerate(CASES.items()):
            folder = ROOT / f"folder_{number}"
            folder.mkdir()
            case.build(folder, GOOD)
        for number, case in enumerate(CASES.values()):  # what an honest load needs is imported here
            if case.outcome == LOADED:
                load(cache, f"warm-{number}", case, ROOT / f"folder_{number}")
        sys.addaudithook(hook)
        for number, (name, case) in enumerate(CASES.items()):
            results[name] = load(cache, f"model-{number}", case, ROOT / f"folder_{number}")
    print(json.dumps({"folders": results, "on purpose": tried_by_itself()}))


if __name__ == "__main__":
    main()
