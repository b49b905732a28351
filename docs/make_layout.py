"""Write the list of files in docs/layout.md: one table a folder, captions from the files. `python docs/make_layout.py`

The caption of a Python file is the first line of its docstring, that of C and YAML the first line of its first comment.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layout.md"
ROOMS = ("tiny_onn_func", "training", "tests", "benchmarks")
LISTED = (".py", ".c", ".h", ".yaml")
BEGIN, END = "<!-- begin: python docs/make_layout.py -->", "<!-- end -->"


def files(folder: Path) -> list[Path]:
    """The listed files of one folder, without its captions' file `__init__.py`."""
    return sorted(path for path in folder.iterdir() if path.suffix in LISTED and path.name != "__init__.py")


def caption(path: Path) -> str:
    """The first line of a file's docstring or first comment, empty where it has none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        return lines[0] if lines else ""
    first = text.splitlines()[0] if text else ""
    return first.strip("#/* ") if first.startswith(("#", "/*")) else ""


def folders(room: Path) -> Iterator[Path]:
    """A room and every folder in it that has listed files, by name."""
    inside = (path for path in room.rglob("*") if path.is_dir() and path.name != "__pycache__")
    yield from (folder for folder in (room, *sorted(inside)) if files(folder))


def tables() -> str:
    """The generated part of the page."""
    parts = []
    for folder in (folder for room in ROOMS for folder in folders(ROOT / room)):
        name, about = folder.relative_to(ROOT).as_posix(), folder / "__init__.py"
        parts += [f"### {name}/", "", *([caption(about), ""] if about.exists() and caption(about) else [])]
        parts += ["| file | caption |", "|---|---|"]
        for path in files(folder):
            text = caption(path).replace("|", "\\|")
            parts.append(f"| [{path.name}](../{path.relative_to(ROOT).as_posix()}) | {text} |")
        parts.append("")
    return "\n".join(parts)


def page(text: str) -> str:
    """The page with its generated part made anew."""
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{tables()}\n{END}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
