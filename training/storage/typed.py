"""Values checked against their types by pydantic; every error one line that names the key.

Configurations stay frozen dataclasses that ask this when they are made. pydantic's dataclasses raise errors of
four lines with one bound of a range, and would have to hold `ModelConfig` and `HyperParams`, which do without pydantic.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from training.errors import UserError
from training.storage.plain_yaml import shown

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
    Sequence: "a list", Mapping: "keys and values below it",
}  # fmt: skip


def typed(hint: Any, value: Any, key: str, shape: str = "") -> Any:
    """Check a value against the type of its key and return it converted; no text for numbers, no NaN.

    Args:
        shape: how the key is written, for the message.

    Raises:
        UserError: it is of another type; the message names the key, and the place in a list.
    """
    try:
        return _adapter(hint).validate_python([*value] if isinstance(value, range) else value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path, of_key = first["loc"], first["loc"][-1:] == ("[key]",)
        for part in path[:-2] if of_key else path:
            key, hint = f"{key}[{part + 1}]" if isinstance(part, int) else f"{key}.{part}", get_args(hint)[-1]
        wanted = _wanted(get_args(hint)[0] if of_key else hint)
        mend = f"; write `{shape}`" if shape else "; write it as [a, b]" if wanted == WORDS[Sequence] else ""
        raise UserError(f"{key}: expected {wanted}, got {shown(first['input'])}{mend}") from None


@cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=STRICT)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of a hint, without ranges and what a list is of: `int | None` -> (int, NoneType)."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(hint) if type(None) in get_args(hint) else (get_origin(hint) or hint,)


def _wanted(hint: Any) -> str:
    if kinds_of(hint) == (Literal,):
        return "one of " + ", ".join(get_args(hint))
    return " or ".join(WORDS.get(kind) or str(kind.__name__) for kind in kinds_of(hint))
