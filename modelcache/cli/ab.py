"""``modelcache ab``: compare models, report on a run, say who gets which arm, and read an exposure log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from modelcache import ModelCache
from modelcache.cli.config_commands import load
from modelcache.cli.output import Exit, complain, data_console, note, table, write_json, write_text

app = typer.Typer(name="ab", help="Compare models, and split traffic between them.", no_args_is_help=True)

_FILE = typer.Argument(help="The configuration. Default: modelcache.yaml.", metavar="FILE")
_HTML = typer.Option("--html", help="Write the report there, one file.", metavar="FILE")
_JSON = typer.Option("--json", help="Write the result as JSON to standard output instead of the table.")
_BLIND = typer.Option("--blind", help="Call the arms A, B, ... by lot, in the report, the table and the JSON.")


@contextmanager
def _explained() -> Iterator[None]:
    """Bad input ends with 2, and a missing package says what to install."""
    try:
        from modelcache.ab import InputError
    except ImportError as error:
        complain(f"{error.name} is not installed; pip install 'modelcache[ab]'")
        raise typer.Exit(Exit.FAILED) from error
    try:
        yield
    except InputError as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from error


@app.command(epilog="Examples:\n\nmodelcache ab run\n\nmodelcache ab run configs/ab_compare.yaml --html ab.html")
def run(
    file: Annotated[Path | None, _FILE] = None,
    *,
    html: Annotated[Path | None, _HTML] = None,
    json: Annotated[bool, _JSON] = False,
    blind: Annotated[bool, _BLIND] = False,
) -> None:
    """Run the comparison `ab.compare` of a configuration. Loads its models and runs its functions."""
    with _explained():
        from modelcache.ab.from_config import compare_from_config

        _make_folder(html)
        found = load(file)
        # Functions that lie beside the configuration, or where the command is called, are found.
        for folder in (found.folder, str(Path.cwd())):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        with ModelCache.from_yaml(str(found.path)) as cache:
            # What is said on the way names the models.
            said = _nothing if blind else note
            _show(compare_from_config(cache, found, on_progress=said), html, json=json, blind=blind)


@app.command(epilog="Examples:\n\nmodelcache ab report run.jsonl --html ab.html")
def report(
    log: Annotated[Path, typer.Argument(help="The record of a run, finished or not.", metavar="LOG")],
    *,
    html: Annotated[Path | None, _HTML] = None,
    json: Annotated[bool, _JSON] = False,
    blind: Annotated[bool, _BLIND] = False,
) -> None:
    """Say what a recorded run found. Runs nothing."""
    with _explained():
        from modelcache.ab import Comparison

        _make_folder(html)
        _show(Comparison.from_log(log), html, json=json, blind=blind)


@app.command(epilog="Examples:\n\nmodelcache ab assign encoder-size alice bob")
def assign(
    experiment: Annotated[str, typer.Argument(help="Its name.", metavar="EXPERIMENT")],
    units: Annotated[list[str], typer.Argument(help="Users, sessions, ...", metavar="UNIT...")],
    *,
    file: Annotated[
        Path | None, typer.Option("--config", help="The configuration. Default: modelcache.yaml.", metavar="FILE")
    ] = None,
) -> None:
    """Say which arm each unit gets, and why."""
    with _explained():
        from modelcache.ab import Experiment

        found = Experiment.from_config(load(file), experiment)
        given = [(unit, found.assign(unit)) for unit in units]
        rows = [(unit, one.arm, str(one.why)) for unit, one in given]
        data_console().print(table(("unit", "arm", "why"), rows))


@app.command(epilog="Examples:\n\nmodelcache ab analyse exposures.jsonl --lower loss")
def analyse(
    log: Annotated[Path, typer.Argument(help="An exposure log.", metavar="LOG")],
    *,
    lower: Annotated[list[str] | None, typer.Option(help="A metric of which less is better.", metavar="NAME")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Say what an exposure log shows so far. Ends with 3 if units were not shared out by the weights."""
    with _explained():
        from modelcache.ab import analyse as analyse_log
        from modelcache.ab.exposures import as_json, as_tables

        found = analyse_log(log, lower_is_better=lower or ())
        if json:
            write_json([as_json(one) for one in found])
        else:
            for one in found:
                for drawn in as_tables(one):
                    data_console().print(drawn)
        for one in found:
            if one.alarm:
                complain(f"{one.experiment}: {one.alarm}")
        raise typer.Exit(Exit.PROBLEMS if any(one.alarm for one in found) else Exit.OK)


def _show(result: object, html: Path | None, *, json: bool, blind: bool) -> None:
    from modelcache.ab import Comparison
    from modelcache.ab.table import print_table

    assert isinstance(result, Comparison)
    shown = result.blinded() if blind else result
    if json:
        write_text(shown.to_json())
    else:
        print_table(shown, sys.stdout)
    if html is not None:
        try:
            shown.to_html(html)
        except OSError as error:
            complain(f"{html}: the report could not be written ({error})")
            raise typer.Exit(Exit.FAILED) from error
        note(f"report: {html}")


def _make_folder(html: Path | None) -> None:
    """Of the report, before anything runs: a run is not to end without one."""
    from modelcache.ab import InputError

    if html is None:
        return
    if html.is_dir():
        raise InputError("this is a folder; --html is the file of the report", str(html))
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the report cannot be written there ({error}); give another place", str(html)) from error


def _nothing(_line: str) -> None:
    """Say nothing."""
