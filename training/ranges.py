"""Ranges of numbers and texts, written beside the field that they bound."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from torch import Tensor

TESTS: dict[str, Callable[[Any, Any], object]] = {  # keywords of JSON Schema
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
    "enum": lambda value, among: value in among,
    "minLength": lambda value, least: len(value) >= least,
    "pattern": lambda value, pattern: re.fullmatch(pattern, value),
}


@dataclass(frozen=True, eq=False)
class Range:
    """Values that a field takes, beside its type in `Annotated`: in words, and as keywords of JSON Schema.

    The keywords are the test as well. pydantic's `Field` would say the same, but the hyper step does without pydantic.
    """

    wanted: str
    rules: dict[str, Any]
    mend: str = ""

    def fits(self, value: Any) -> bool:
        """True if every rule holds for a value."""
        return all(TESTS[rule](value, bound) for rule, bound in self.rules.items())

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return handler(schema) | self.rules


ABOVE_0 = Range("more than 0", {"exclusiveMinimum": 0})
FROM_0 = Range("0 or more", {"minimum": 0})
FROM_1 = Range("1 or more", {"minimum": 1})
FROM_0_TO_1 = Range("0 to 1", {"minimum": 0, "maximum": 1})
BELOW_1 = Range("0 or more and less than 1", {"minimum": 0, "exclusiveMaximum": 1})
ABOVE_0_TO_1 = Range("more than 0 and at most 1", {"exclusiveMinimum": 0, "maximum": 1})
SEED = Range("0 to 2**63 - 1", {"minimum": 0, "maximum": 2**63 - 1})  # what a torch.Generator takes
SIGN = Range("1 or -1", {"enum": [1, -1]})


def ranges_of(kind: type) -> dict[str, Range]:
    """Map each field with a `Range` in its annotation to it."""
    hints = get_type_hints(kind, include_extras=True).items()
    return {name: mark for name, hint in hints for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range)}


def out_of_range(values: object, ranges: Mapping[str, Range]) -> str | None:
    """Error text for the first field whose value is out of its range; None if all fit. Tensors and None pass."""
    for name, range_ in ranges.items():
        value = getattr(values, name)
        if value is None or isinstance(value, Tensor):
            continue
        if not (_is_number_within(range_, value) if type(value) in (int, float) else range_.fits(value)):
            return f"{name}: expected {range_.wanted}, got {value!r}" + (range_.mend and f"; {range_.mend}")
    return None


@lru_cache(maxsize=1024)  # a step asks for the same ones every time
def _is_number_within(range_: Range, value: int | float) -> bool:
    return range_.fits(value)
