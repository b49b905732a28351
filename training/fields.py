"""Fields of records: unit and meaning of each key of metrics.jsonl, summary.json, results.csv and analysis.json.

Each text stands where its field is made; `docs/make_reference.py` collects them into docs/records.md and the glossary.
"""

import ast
import inspect
from itertools import pairwise
from typing import NamedTuple, get_type_hints


class Field(NamedTuple):
    """Unit and meaning of a key."""

    unit: str
    """Unit or kind of the value: nats per token, share, s, text, ..."""
    text: str
    """Meaning, in a sentence."""


Fields = dict[str, Field]


def field_texts(kind: type) -> dict[str, str]:
    """Map each field of a class to the string that stands below it in the source, with its line breaks."""
    body = getattr(ast.parse(inspect.getsource(kind)).body[0], "body", [])
    return {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def fields_of(kind: type) -> Fields:
    """Fields of a class whose annotations are `Annotated[type, unit]`, each with its text below it."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: Field(hints[name].__metadata__[0], " ".join(text.split())) for name, text in field_texts(kind).items()
    }


def show_in_help(kind: type) -> None:
    """Give each field of a NamedTuple its text as its docstring, in place of "Alias for field number 0"."""
    for name, text in field_texts(kind).items():
        getattr(kind, name).__doc__ = text
