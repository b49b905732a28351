"""Shell completion of verbs and flags, which tyro writes."""

import argparse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import make_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from training.errors import UserError
from training.run.describe import settings_page

SHELLS = ("bash", "zsh")


def print_completion(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Print a script for a shell that completes `tiny-onn`.

    Args:
        parsers: verb -> its flags; `train`, whose flags are the settings, joins them.

    Raises:
        UserError: no such shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--print-completion: expected {' or '.join(SHELLS)}, got {shell!r}; name one of them")
    import tyro

    pages = {"train": (settings_page(), "train a model")}
    pages |= {verb: (_page(verb, parser), str(parser.description)) for verb, parser in parsers.items()}
    verbs = [Annotated[page, tyro.conf.subcommand(verb, description=text)] for verb, (page, text) in pages.items()]
    any_verb: Any = reduce(or_, verbs)
    with suppress(SystemExit):
        tyro.cli(any_verb, args=["--tyro-write-completion", shell, "-"], prog="tiny-onn")


def _page(verb: str, parser: argparse.ArgumentParser) -> type:
    """The flags of a parser as a class that tyro reads."""
    from tyro.conf import FlagCreatePairsOff, Positional, arg

    columns: list[Any] = []
    for action in parser._actions:
        kind: Any = Literal[tuple(action.choices)] if action.choices else action.type or str
        if action.nargs == 0:
            kind = Annotated[bool, FlagCreatePairsOff]
        elif not action.option_strings:
            kind = Annotated[kind if action.choices else Path, Positional]
        aliases = [name for name in action.option_strings if not name.startswith("--")]
        if action.dest != "help":
            columns.append((action.dest, Annotated[kind, arg(help=action.help, aliases=aliases)]))
    return make_dataclass(verb, columns)
