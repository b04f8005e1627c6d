"""What no key can tell alone: names that must exist, options of loaders, paths and where they lead, sizes that clash.

It looks at words, not at settings, so that it finds its problems beside those of single keys, in the same pass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from modelcache.config.ab_crossing import look_at_ab
from modelcache.config.document import Path, Tree
from modelcache.config.schema import SimulatedSettings
from modelcache.config.values import Absolute, Scalar, read_optional_budget, read_path, read_size, word
from modelcache.spec import LOADER_KINDS, did_you_mean, is_entry, option_problems
from modelcache.units import format_bytes, parse_bytes

#: Keys of a model that are handed to its loader.
LOADER_OPTIONS = ("path", "model", "weights", "task", "dtype")
#: Those of them that are paths.
PATH_OPTIONS = ("path", "weights")
_DECIMAL = re.compile(r"\s*\d+(?:\.\d+)?\s*(?:[KMGT]B)\s*", re.ASCII)


class Report(Protocol):
    """Takes one problem, at a path of the tree."""

    def __call__(self, path: Path, message: str, *, at_key: bool = False, severity: str = "error") -> None:
        """Note it; `at_key` means that the key is at fault, not its value."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """One look across the tree of a file with everything that lies on top of it.

    Attributes:
        tree: The words.
        folder: Where relative paths begin; absolute.
        report: Told of each problem.
    """

    tree: Mapping[str, Tree]
    folder: str
    report: Report

    def look(self) -> None:
        """Report everything."""
        self._preload()
        roots = (self.folder, *(self._absolute(root) for root in _paths(self.tree.get("roots"))))
        for name, model in _items(self.tree.get("models")):
            if isinstance(model, dict):
                self._options(("models", name), model)
                self._contain(("models", name), model, roots)
        look_at_ab(self.tree, dict(_items(self.tree.get("models"))), self.report)
        self._budgets()
        self._too_large()
        self._unused()

    # --- names and options ----------------------------------------------------------------------------------------

    def _preload(self) -> None:
        models, preload = dict(_items(self.tree.get("models"))), self.tree.get("preload")
        seen: set[str] = set()
        for index, value in enumerate(preload if isinstance(preload, (list, tuple)) else ()):
            name = word(value)
            if name is None:
                continue
            if name not in models:
                hint = did_you_mean(name, models) or "; models are listed in 'models'"
                shown = repr(name if len(name) <= 80 else name[:77] + "...")
                self.report(("preload", index), f"no model is called {shown}{hint}")
            elif name in seen:
                self.report(("preload", index), f"{name!r} is listed already; remove one of them")
            seen.add(name)

    def _options(self, at: Path, model: Mapping[str, Tree]) -> None:
        loader = word(model.get("loader"))
        if loader is None or not (loader in LOADER_KINDS or is_entry(loader)):
            return
        given = [option for option in LOADER_OPTIONS if option in model]
        for option, message in option_problems(loader, given):
            if option in given:
                self.report((*at, option), message, at_key=True)
            else:
                self.report(at, f"{option} {message}", at_key=True)
        cls = word(model.get("model"))
        if loader == "safetensors" and cls is not None and not is_entry(cls):
            self.report((*at, "model"), f'must be your class, "package.module:Class", got {cls[:60]!r}')
        if loader == "transformers" and cls is not None and not cls.isidentifier():
            self.report(
                (*at, "model"), f"must be the name of a class of transformers, such as AutoModel, got {cls[:60]!r}"
            )
        if loader == "transformers" and cls is not None and word(model.get("task")) is not None:
            self.report((*at, "task"), "chooses the class, and so does 'model'; leave one of them out", at_key=True)

    # --- paths ----------------------------------------------------------------------------------------------------

    def _absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.folder, path))  # noqa: PTH118 - '..' is taken off without a look.

    def _contain(self, at: Path, model: Mapping[str, Tree], roots: Iterable[str]) -> None:
        """Report a path that leaves every root: as it is written first, and only then by a look at the links in it."""
        for option in PATH_OPTIONS:
            for written in _paths(model.get(option)):
                target = self._absolute(written)
                if not any(_is_below(target, root) for root in roots):
                    self.report(
                        (*at, option),
                        f"{_short(written)} leaves the folder of this file; add its folder to 'roots' if this is "
                        "intended",
                    )
                    continue
                real = os.path.realpath(target)
                if not any(_is_below(real, os.path.realpath(root)) for root in roots):
                    self.report(
                        (*at, option),
                        f"{_short(written)} leads to {_short(real)} by a symbolic link, out of the folder of this "
                        "file; add that folder to 'roots' if this is intended",
                    )

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _budgets(self) -> None:
        """Sizes that cannot hold together on any machine, and those that are probably not meant."""
        for key, value in _items(self.tree.get("budgets")):
            text = value.text.strip() if isinstance(value, Scalar) else ""
            if key != "disk" and _DECIMAL.fullmatch(text) and self._budget(key) is not None:
                self.report(("budgets", key), _decimal_size(text), severity="warning")
        ram, page_locked = self._budget("ram"), self._budget("page_locked")
        if ram is not None and page_locked is not None and page_locked > ram:
            self.report(
                ("budgets", "page_locked"),
                f"{format_bytes(page_locked)} exceeds budgets.ram, {format_bytes(ram)}, of which it is a part; lower "
                "it or raise budgets.ram",
            )
        vram = self._budget("vram")
        if word(self.tree.get("device")) == "simulated" and vram is not None:
            capacity = self._capacity()
            if capacity is not None and vram > capacity:
                self.report(
                    ("budgets", "vram"),
                    f"{format_bytes(vram)} exceeds the {format_bytes(capacity)} of the simulated device; lower it or "
                    "raise simulated.capacity",
                )

    def _too_large(self) -> None:
        """A model that says its size and can never run within a budget that says its size."""
        on_ram = word(self.tree.get("device")) == "host_only"
        tier = "ram" if on_ram else "vram"
        budget = self._budget(tier)
        pinned, num_pinned = 0, 0
        for name, model in _items(self.tree.get("models")):
            size = _size(model.get("size")) if isinstance(model, dict) else None
            if budget is None or size is None or not isinstance(model, dict):
                continue
            needed = size + (_size(model.get("workspace")) or 0)
            if needed > budget:
                self.report(
                    ("models", name, "size"),
                    f"{format_bytes(needed)} with its workspace exceeds budgets.{tier}, {format_bytes(budget)}; it can "
                    "never be used: raise the budget or name a smaller variant",
                    severity="warning",
                )
            elif word(model.get("pin")) == tier:
                pinned, num_pinned = pinned + needed, num_pinned + 1
        if budget is not None and num_pinned > 1 and pinned > budget:
            self.report(
                ("budgets", tier),
                f"the {num_pinned} models pinned there need {format_bytes(pinned)} together, more than the "
                f"{format_bytes(budget)} of it; pin fewer",
                severity="warning",
            )

    def _budget(self, key: str) -> int | None:
        """A budget in bytes, if it is written as an absolute size."""
        value = dict(_items(self.tree.get("budgets"))).get(key)
        if value is None:
            return None
        try:
            size = read_optional_budget(value)
        except ValueError:
            return None
        return size.size_bytes if isinstance(size, Absolute) else None

    def _capacity(self) -> int | None:
        section = dict(_items(self.tree.get("simulated")))
        return _size(section["capacity"]) if "capacity" in section else SimulatedSettings().capacity

    # --- what nobody will read ------------------------------------------------------------------------------------

    def _unused(self) -> None:
        """Keys without an effect, if the device is known. On `auto` the same file serves every machine."""
        budgets = dict(_items(self.tree.get("budgets")))
        if word(self.tree.get("device")) == "host_only":
            for key in ("vram", "page_locked"):
                if word(budgets.get(key)) not in {None, "auto", "none"}:
                    message = "not used with 'device: host_only', where RAM is the top tier"
                    self.report(("budgets", key), message, severity="warning")
            if word(self.tree.get("memory")) not in {None, "allocated"}:
                message = "not used with 'device: host_only', where there is no device memory"
                self.report(("memory",), message, severity="warning")
        if word(self.tree.get("image_dir")) is not None and word(budgets.get("disk")) in {None, "none"}:
            message = "not used without budgets.disk; set that as well, to 100GiB or the like"
            self.report(("image_dir",), message, at_key=True, severity="warning")


def _items(value: object) -> tuple[tuple[str, Tree], ...]:
    return tuple(value.items()) if isinstance(value, dict) else ()


def _paths(value: object) -> tuple[str, ...]:
    """The paths in a value that can be read as such; what cannot has its own finding."""
    found = []
    for each in value if isinstance(value, (list, tuple)) else (value,):
        try:
            found.append(read_path(each))
        except ValueError:
            continue
    return tuple(found)


def _size(value: object) -> int | None:
    try:
        return read_size(value)
    except ValueError:
        return None


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _short(path: str) -> str:
    return repr(path if len(path) <= 120 else path[:117] + "...")


def _decimal_size(text: str) -> str:
    """``24GB`` is less than the card of that name has."""
    size_bytes = parse_bytes(text)
    gib = f"{size_bytes / (1 << 30):.2f} GiB" if size_bytes >= 1 << 30 else format_bytes(size_bytes)
    return f'"{text}" is {gib}; if you mean the binary unit, write "{text[:-1]}iB"'
