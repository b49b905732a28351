"""A page: values in a jinja template, with the style sheet, plotly and a small script inlined, so that one file is all.

Nothing is fetched, and only the two scripts that are written here may run: the policy of the page names them by hash.
"""

import base64
import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from training.report.html.charts import COLOURS, slot_class
from training.report.html.heat_maps import BLACK, GREY, SCALES
from training.report.html.wording import NOTHING, printable

VERDICTS = ("better", "worse", "equivalent", "undecided")
LIVE = 2000  # milliseconds between two looks of a page that is served while its run goes on


class Page(NamedTuple):
    """A page's title and its main part, which a live page asks for again."""

    title: str
    main: str

    def html(self, *, live: bool = False) -> str:
        """The whole document; a live one looks for a newer main part."""
        scripts = [plotly(), _source("page.js")]
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"
        return _environment().get_template("page.html").render(
            title=self.title, main=Markup(self.main), live=LIVE if live else 0, style=Markup(_style()),  # noqa: S704
            policy=policy + ("; connect-src 'self'" if live else ""),
            scripts=[Markup(script) for script in scripts],  # noqa: S704  the package's own and page.js
        )  # fmt: skip


class Cell(NamedTuple):
    """A cell of a table: its text, small lines below it, the colour of an arm before it."""

    text: str
    small: tuple[str, ...] = ()
    badge: bool = False  # the text is a verdict
    slot: int | None = None


class Figures:
    """The figures of a page in the order in which its template shows them."""

    def __init__(self) -> None:
        self.specs: dict[str, Mapping[str, Any]] = {}

    def add(self, spec: Mapping[str, Any]) -> str:
        """The id under which the page's script finds a figure."""
        key = f"figure{len(self.specs) + 1}"
        self.specs[key] = spec
        return key


def render(title: str, template: str, **values: Any) -> Page:
    """A page of a template.

    Raises:
        LookupError: a value is not of the form that the template wants.
    """
    try:
        main = _environment().get_template(template).render(figures=Figures(), versions=versions(), **values)
    except UndefinedError as error:
        raise LookupError(str(error)) from error
    return Page(printable(title), main)


def versions() -> str:
    """Versions of the packages, of Python and of the platform that wrote the page."""
    named = [f"{name} {_version(name)}" for name in ("tiny-onn-func", "torch", "numpy", "plotly")]
    return ", ".join([*named, f"Python {platform.python_version()}", platform.platform(terse=True)])


@cache
def plotly() -> str:
    """The script of the plotly package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def _environment() -> Environment:
    loader = PackageLoader("training.report.html")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "sort_keys": False}
    environment.globals |= {"verdicts": VERDICTS, "NOTHING": NOTHING}
    environment.filters["slot_class"] = slot_class
    return environment


@cache
def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _style() -> str:
    """The style sheet, with the colours of the maps and of the slots."""
    levels = {f"{kind}{level}": colour for kind, scale in SCALES.items() for level, colour in enumerate(scale)}
    cells = [f".{name}{{fill:{colour}}}" for name, colour in (levels | {"none": BLACK, "unknown": GREY}).items()]
    slots = [f".c{i}{{stroke:var(--c{i})}}" for i in range(COLOURS + 1)]
    return "\n".join([_source("style.css"), *cells, *slots])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
