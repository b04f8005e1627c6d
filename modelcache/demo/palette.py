"""Colours of the models: distinguishable without red-green vision, on dark and on light."""

from __future__ import annotations

#: For light backgrounds, for dark ones; the i-th model has the i-th colour.
LIGHT = ("#2f6fb5", "#e08a1e", "#2a9d78", "#b5489a", "#7a5fd0", "#8a6d3b", "#c4453c", "#4f8f2f")
DARK = ("#5b9be0", "#f0a848", "#4cc3a0", "#dc7fc4", "#a48df0", "#c2a268", "#ee7d74", "#86c45e")


def terminal_colour(index: int) -> str:
    """Of the i-th model, for rich."""
    return DARK[index % len(DARK)]


def style_sheet() -> str:
    """The colours as CSS variables ``--m0`` ... of both schemes."""
    light, dark = ("".join(f"--m{i}:{colour};" for i, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
