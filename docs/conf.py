"""Sphinx configuration of the documentation site: `sphinx-build -W -b html docs build/site`."""

import importlib
import importlib.metadata
import inspect
import re
from typing import Any

from training.fields import field_texts

project = "Tiny-ONN"
author = "The Tiny-ONN authors"
release = importlib.metadata.version("tiny-onn-func")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["*.py", "images"]
html_theme = "furo"
html_title = f"Tiny-ONN {release}"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints = "signature"
napoleon_google_docstring = True
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
suppress_warnings = ["ref.python"]  # fields of the same name in two classes

CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"(?<!\\)([*|]|_(?=\W|$))")  # what reStructuredText reads as markup


def as_restructured_text(lines: list[str]) -> list[str]:
    """Docstring lines with what is no markup escaped, and indented formulas and examples as literal blocks."""
    escaped: list[str] = []
    in_literal = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        after_blank = number > 0 and not lines[number - 1].strip()
        in_literal = indent >= 4 and (in_literal or after_blank) if line.strip() else in_literal
        if in_literal and after_blank and line.strip() and not (escaped and escaped[-1].startswith(" ")):
            before = next((text for text in reversed(lines[:number]) if text.strip()), "")
            if len(before) - len(before.lstrip()) < 4:
                escaped += ["::", ""]
        if in_literal or not line.strip():
            escaped.append(line)
            continue
        parts = CODE.split(line)
        escaped.append("".join(part if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts))
    return escaped


def field_comment(name: str) -> str:
    """Text below a NamedTuple's field, or behind its `#`, given as module.Class.field; empty where it has none."""
    path, _, field = name.rpartition(".")
    module, _, owner = path.rpartition(".")
    kind = getattr(importlib.import_module(module), owner)
    if text := field_texts(kind).get(field):
        return " ".join(text.split())
    source = inspect.getsource(kind)
    found = re.search(rf"^    {field}: .*?  # (.*)$", source, re.MULTILINE)
    return found.group(1) if found else ""


def after_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon reads into a field's text: the "AdamW" of "AdamW: decay" is no type."""
    types = [number for number, line in enumerate(lines) if line.startswith(":type:")]
    if types:
        first, text = lines[types[0]].removeprefix(":type:").strip(), lines[: types[0]]
        lines[:] = [f"{first}: {text[0]}", *text[1:]]


def before_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Event handler of autodoc."""
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = [field_comment(name)]
    lines[:] = as_restructured_text(lines)


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Event handler of autodoc: skip the methods of autograd functions, whose texts are PyTorch's."""
    return True if name in ("forward", "backward", "vmap", "setup_context") and what == "class" else None


def setup(app: Any) -> None:
    """Connect the handlers."""
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
