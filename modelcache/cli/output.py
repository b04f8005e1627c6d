"""Where output goes and what exit codes mean: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelcache import Finding

# Without a terminal there is no width to keep to: nothing is cut off or wrapped in a file or a pipe.
_PIPE_WIDTH = 400


class Exit(IntEnum):
    """What a command ends with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PROBLEMS = 3
    INTERRUPTED = 130


def write_json(value: object) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def write_text(text: str) -> None:
    """Write data as it is to standard output, with one line end."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def data_console() -> Console:
    """Rich output on standard output, made when it is used: a test or a pipe may have replaced the stream."""
    return _console(is_error=False)


def note(message: str) -> None:
    """Say something that is not data, on standard error."""
    _console(is_error=True).print(Text(message))


def complain(message: str) -> None:
    """Say what went wrong, on standard error."""
    _console(is_error=True).print(Text.assemble(("error: ", "bold red"), message))


def finding_line(finding: Finding) -> str:
    """``file:line:column: severity: key: message``, without the parts that are not known."""
    place = ":".join(str(part) for part in (finding.path, finding.line, finding.column) if part is not None)
    return ": ".join(part for part in (place, finding.severity, finding.key, finding.message) if part)


def finding_json(finding: Finding) -> dict[str, str | int | None]:
    """The same, for programs."""
    return {
        "path": finding.path,
        "line": finding.line,
        "column": finding.column,
        "severity": finding.severity,
        "key": finding.key,
        "message": finding.message,
    }


def complain_about(findings: Iterable[Finding]) -> None:
    """One line a finding, on standard error."""
    for finding in findings:
        sys.stderr.write(finding_line(finding) + "\n")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[str, str] | None = None) -> Table:
    """A table as the commands draw it: no lines, headings in capitals, cells taken literally.

    Args:
        headings: One a column; a leading ``>`` aligns it to the right.
        rows: Cells.
        styles: Heading -> style of its column.
    """
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        name = heading.removeprefix(">")
        style = (styles or {}).get(name)
        drawn.add_column(name.upper(), justify="right" if heading[0] == ">" else "left", style=style, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _console(*, is_error: bool) -> Console:
    stream = sys.stderr if is_error else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=is_error)
