"""The commands and their help. No command imports torch unless it says so."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from modelcache import ConfigError, ModelCacheError, __version__
from modelcache.cli import ab, config_commands, demo, doctor, plan
from modelcache.cli.output import Exit, complain, complain_about, write_text

# One line a paragraph: the help wraps it to the terminal.
_EPILOG = (
    "Examples:\n\n"
    "modelcache demo\n\n"
    "modelcache doctor\n\n"
    "modelcache config init && modelcache config check\n\n"
    "modelcache plan --vram 24GiB\n\n"
    "Data goes to standard output, everything else to standard error. "
    "Ends with 0 (ok), 1 (failed), 2 (wrong usage or configuration), 3 (checks found problems) or 130 (interrupted)."
)


class _Commands(TyperGroup):
    """Turns the errors of modelcache into words and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # the base names a vendored class
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            complain_about(error.findings)
            raise typer.Exit(Exit.USAGE) from error
        except ModelCacheError as error:
            complain(str(error))
            raise typer.Exit(Exit.FAILED) from error


app = typer.Typer(
    cls=_Commands,
    name="modelcache",
    help="GPU memory as a cache over RAM over disk, for whole PyTorch models.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        write_text(f"modelcache {__version__}")
        raise typer.Exit(Exit.OK)


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command(epilog=plan.EPILOG)(plan.plan)
app.add_typer(config_commands.app)
app.add_typer(ab.app)
