"""The `edge-kv` command: a module for each command, which parses, calls one function and prints.

Heavy imports happen inside commands; nothing here but `export` ever imports torch. Deliberate
errors are caught in one place and shown as one line on stderr, exit status 1.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Annotated

import typer

from edge_kv import __version__
from edge_kv.cli import bench, deploy, evaluate, export, plan, run, serve, shelf, verify
from edge_kv.cli.commands import Commands
from edge_kv.cli.options import flag
from edge_kv.cli.printing import Notices, say_error
from edge_kv.cli.streams import flush_stdout, open_streams
from edge_kv.errors import unusable
from edge_kv.signals import end_on_signals, say_of_cut_files

COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.plan,
    "export": export.export,
    "run": run.run,
    "bench": bench.bench,
    "inspect": shelf.inspect,
    "list": shelf.list_artifacts,
    "cache": shelf.cache,
    "verify": verify.verify,
    "eval": evaluate.evaluate,
    "deploy": deploy.deploy,
    "serve": serve.serve,
}
"""Every command by the name that users type, in the order of the help."""


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help="KV-efficient language models from checkpoint to phone, with the memory known first.",
)


def main() -> None:
    """The command, from its arguments to its exit."""
    open_streams()
    end_on_signals()
    say_of_cut_files()
    status: str | int | None = 0
    fault: OSError | None = None
    try:
        app(prog_name="edge-kv")
    except SystemExit as done:
        status = done.code
    except OSError as e:  # --help and --version, which are no commands, could not be printed
        fault = e
    fault = flush_stdout() or fault
    if fault and not status:
        if fault.errno != errno.EPIPE:  # whoever read this has gone
            say_error(unusable(fault))
        status = 1
    raise SystemExit(status)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edge-kv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        flag("--version", "Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    notices = logging.getLogger("edge_kv")
    notices.handlers[:] = [Notices()]
    notices.setLevel(logging.INFO)


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
