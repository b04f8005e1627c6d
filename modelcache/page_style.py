"""How our pages look: light and dark, nothing from elsewhere, colours told apart without red-green vision."""

from __future__ import annotations

#: For light backgrounds, for dark ones; the i-th model has the i-th colour.
LIGHT = ("#2f6fb5", "#e08a1e", "#2a9d78", "#b5489a", "#7a5fd0", "#8a6d3b", "#c4453c", "#4f8f2f")
DARK = ("#5b9be0", "#f0a848", "#4cc3a0", "#dc7fc4", "#a48df0", "#c2a268", "#ee7d74", "#86c45e")


def page_colour(index: int) -> str:
    """Of the i-th model, as a page with `style_sheet` writes it; after the last colour they come again."""
    return f"var(--m{index % len(LIGHT)})"


def terminal_colour(index: int) -> str:
    """Of the i-th model, for rich."""
    return DARK[index % len(DARK)]


_LIGHT_PAPER = "--bg:#fff;--fg:#1d2129;--dim:#667085;--line:#d8dce3;--soft:#f3f5f8;--good:#1f8a5b;--bad:#c4352b"
_DARK_PAPER = "--bg:#14171c;--fg:#e6e9ee;--dim:#98a2b3;--line:#333a45;--soft:#1d2229;--good:#4cc38a;--bad:#ff7a70"
_BASE = """
*{box-sizing:border-box}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;
padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 8px}p{margin:6px 0;max-width:110ch}
.dim{color:var(--dim)}code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:8px 12px;margin:6px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:8px 0;width:100%}th,td{padding:5px 12px 5px 0;text-align:left;
border-bottom:1px solid var(--line);vertical-align:top}th{font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.good{color:var(--good);font-weight:700}.bad{color:var(--bad);font-weight:700}.scroll{overflow-x:auto}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0}.key span::before{content:"";display:inline-block;width:12px;
height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px;background:var(--c)}
"""


def colours() -> str:
    """The colours of both schemes as CSS variables: ``--m0`` ... of the models, and those of paper and ink."""
    light, dark = ("".join(f"--m{i}:{colour};" for i, colour in enumerate(each)) for each in (LIGHT, DARK))
    return f":root{{{light}{_LIGHT_PAPER}}}@media (prefers-color-scheme:dark){{:root{{{dark}{_DARK_PAPER}}}}}"


def style_sheet() -> str:
    """The base of a page's style, colours included."""
    return f"{colours()}{_BASE}"
