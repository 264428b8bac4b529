"""How the command line is parsed, and the one place where errors become a line and a status."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from edge_kv.cli.printing import say_error
from edge_kv.errors import Cancelled, EdgeKVError, unusable
from edge_kv.signals import INTERRUPTED

_USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError of whichever click typer carries
_WORDS = "edge_kv.words"  # where a context keeps what was typed


class Commands(TyperGroup):
    """The one place where errors become a line and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        alone = not args
        ctx.meta[_WORDS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except _USAGE as e:
            if alone:  # its message is the help
                raise
            say_error(_usage(e, None, ctx.meta[_WORDS]))
            raise typer.Exit(2) from e

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from edge_kv.guidance import command_for

            meant = command_for(args[0], self.list_commands(ctx))
            hint = f"Did you mean `edge-kv {meant}`?" if meant else "See `edge-kv --help`."
            say_error(f"There is no command {args[0]!r}. {hint}")
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _USAGE as e:
            say_error(_usage(e, ctx.invoked_subcommand, ctx.meta.get(_WORDS, ())))
            raise typer.Exit(2) from e
        except Cancelled as e:
            typer.echo(str(e), err=True)
            raise typer.Exit(INTERRUPTED) from e
        except EdgeKVError as e:
            say_error(str(e))
            raise typer.Exit(1) from e
        except OSError as e:
            if e.errno == errno.EPIPE:  # whoever read this has gone
                raise
            say_error(unusable(e))
            raise typer.Exit(1) from e
        except KeyboardInterrupt as e:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from e


def _usage(error: Any, command: str | None, given: Sequence[str]) -> str:
    """What to say of the words `given`, of `command`, that the parser does not understand."""
    from edge_kv.guidance import usage_advice, whole_option

    found = error.ctx
    command = found.command.name if found and found.parent else command or ""
    options = (
        [o for p in found.command.params for o in p.opts if o.startswith("-")] if found else []
    )
    commands = found.command.commands if found and not found.parent else {}
    words = re.search(r"extra arguments?(?:\(s\))? \((.*)\)", error.format_message())
    parameter = getattr(error, "param", None)
    kind = type(error).__name__
    unknown = error.option_name if kind == "NoSuchOption" else ""
    if len(unknown) == 2 and unknown not in given:
        unknown = whole_option(unknown, given)
    return usage_advice(
        command,
        options,
        error.format_message(),
        unknown=unknown,
        elsewhere=next(
            (name for name, c in commands.items() if any(unknown in p.opts for p in c.params)), ""
        ),
        lacks=parameter.name if parameter and kind == "MissingParameter" else "",
        extra=words[1].split() if words else (),
        given=str(found.params.get("artifact") or "ARTIFACT") if found else "ARTIFACT",
        named=bool(found and (found.params.get("model") or found.params.get("weights"))),
    )
