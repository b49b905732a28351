"""Pieces of a web page: elements whose text is escaped by default, tables, boxes, numbers, the page around them."""

import html
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from training.report.html.style import STYLE

NOTHING = "\u2013"  # an empty cell of a table
MINUS = "\u2212"  # as wide as a plus sign
LONG = 40  # characters of a fact that stands alone
VOID = ("meta", "br", "link")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is fetched, nothing is executed
USUAL_LEVEL = 0.95  # of every interval that does not say its own
VERDICTS = ("better", "worse", "equivalent", "undecided")


class Html(str):
    """Markup that is fit for a page as it is; any other text is escaped where it enters one."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Text as markup that shows it; Html stays what it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other."""
    return Html("".join(escaped(part) for part in parts))


def element(tag: str, *parts: object, **attributes: object) -> Html:
    """<tag attributes>parts</tag>. `class_` and `stroke_width` are written class and stroke-width; None is left out."""
    named = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    head = "".join(f' {name}="{escaped(value)}"' for name, value in named)
    return Html(f"<{tag}{head}>" if tag in VOID else f"<{tag}{head}>{join(parts)}</{tag}>")


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


def with_small(text: object, small: object) -> Html:
    """A value, and below it in small print what belongs to it."""
    return join((text, element("small", small))) if small else escaped(text)


def badge(verdict: str) -> Html:
    """A verdict as a coloured word."""
    return element("span", verdict, class_=f"badge {verdict if verdict in VERDICTS else 'plain'}")


def table(
    label: str, head: Sequence[object], rows: Iterable[Sequence[object]], *, kind: str | None = None, tall: bool = False
) -> Html:
    """A table in a box that scrolls by itself; the first cell of a row names it. A row of one cell heads a group.

    Kinds of the style sheet: `words` are left-aligned, `verdicts` have words in the second column, `every` is small on
    paper.
    """
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = []
    for name, *cells in rows:
        if not cells and len(head) > 1:
            body.append(element("tr", element("th", name, colspan=len(head), scope="rowgroup"), class_="group"))
        else:
            named = element("th", name, scope="row")
            body.append(element("tr", named, *(element("td", cell) for cell in cells)))
    whole = element("table", element("thead", top), element("tbody", *body), class_=kind)
    return box(whole, label, tall=tall)


def box(inside: object, label: str, *, tall: bool = False) -> Html:
    """A part that may be wider than the page; `tall` ones scroll downwards, too. Keys move it as fingers do."""
    return element("div", inside, class_="box tall" if tall else "box", role="region", aria_label=label, tabindex="0")


def listing(label: str, text: str) -> Html:
    """Text as it is: a file, a command, a sample."""
    return box(element("pre", element("code", text)), label, tall=text.count("\n") > 30)


def section(title: str, *parts: object) -> Html:
    """A part of the page under its heading."""
    return element("section", element("h2", title), *parts)


def paragraph(*parts: object, class_: str | None = None) -> Html:
    """Running text."""
    return element("p", *parts, class_=class_)


def warning(*parts: object) -> Html:
    """Box with a warning."""
    return element("div", *parts, class_="warning", role="note")


def bullets(items: Iterable[object]) -> Html:
    """A list with dots."""
    return element("ul", *(element("li", item) for item in items))


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names with their values, side by side where there is room; a long value has a line of its own."""
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value), class_="wide" if len(str(value)) > LONG else None)
            for name, value in pairs
        ),
    )


def page(title: str, *parts: object) -> str:
    """The whole document: no script, nothing from elsewhere."""
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("main", *parts))
    return f"<!DOCTYPE html>\n{element('html', element('head', *head), body, lang='en')}\n"


def versions() -> str:
    """Versions of the packages, of Python and of the platform that wrote the page."""
    named = [f"{name} {_version(name)}" for name in ("tiny-onn-func", "torch", "numpy")]
    return ", ".join([*named, f"Python {platform.python_version()}", platform.platform(terse=True)])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
