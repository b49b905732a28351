"""Numbers, intervals and text as a page shows them."""

import math
import re
from collections.abc import Mapping
from typing import Any

NOTHING = "\u2013"  # an empty cell of a table
MINUS = "\u2212"  # as wide as a plus sign
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
USUAL_LEVEL = 0.95  # of every interval that does not say its own


def number(value: object, form: str = ".4f") -> str:
    """A number as the page shows it; a dash for what is unknown or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NOTHING
    text = format(value, form)
    return text.replace("-", MINUS) if any(digit in text for digit in "123456789") else text.lstrip("-+")


def bounds(low: object, high: object, form: str = ".4f") -> str:
    """An interval, or "" where there is none."""
    return "" if low is None or high is None else f"{number(low, form)} to {number(high, form)}"


def level_note(pair: Mapping[str, Any]) -> str:
    """The level of a difference's interval as text, where it is not the usual 95 %."""
    level = pair.get("level") or USUAL_LEVEL
    return "" if level == USUAL_LEVEL else f" ({100 * level:.4g} %)"


def speedup_text(speedup: Mapping[str, Any] | None) -> str:
    """The speed-up as the terminal and the report show it; "" where there is none."""
    if not speedup:
        return ""
    if speedup["reached"] == speedup["n"]:
        return f"{'< ' if speedup['early'] else ''}{speedup['estimate']:.2f}"
    beyond = f", {speedup['estimate']:.2f} extrapolated" if speedup["estimate"] is not None else ""
    return f"> {speedup['at_least']:.2f}{beyond}"


def speedup_bounds(speedup: Mapping[str, Any] | None) -> str:
    """The interval of a speed-up, "" where there is none."""
    return "" if not speedup or speedup["low"] is None else f"{speedup['low']:.2f} to {speedup['high']:.2f}"


def printable(value: object) -> str:
    """Text without characters that no page may hold."""
    return UNPRINTABLE.sub("\ufffd", str(value))


def plural(count: int, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
