"""The house keeps its walls: floors, private torch modules, packages whose __init__ is a caption, and its words."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT

PACKAGES = ("tiny_onn_func", "training")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PRIVATE = {"tiny_onn_func/tree.py", "tiny_onn_func/primitives/vmap.py", "tiny_onn_func/kernels/runtime.py"}
DOCUMENTED = (*PACKAGES, "benchmarks", "examples")
PRONOUNS = re.compile(r"(What|Which|Who|Whoever|Whether|How|Nobody)\b")
PROMISED = {"tiny_onn_func/__init__.py", "training/__init__.py", "training/data/__init__.py"}  # that offer names


def private_torch(source: str) -> Iterator[str]:
    """Private modules of torch that a source imports, and private names that it reaches through `torch`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if alias.name.startswith("torch")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            named = [f"torch.{node.attr}"]
        else:
            continue
        yield from (name for name in named if any(part.startswith("_") for part in name.split(".")))


def test_private_torch_modules_are_imported_in_three_files() -> None:
    allowed = {"torch.__version__", "torch._assert_async"}  # the second has no public name (2.13)
    imports = {
        str(path.relative_to(ROOT)): [name for name in private_torch(path.read_text("utf-8")) if name not in allowed]
        for path in SOURCES
    }
    assert {name for name, private in imports.items() if private} == PRIVATE


@pytest.mark.parametrize(
    "source", ["from torch._C import x", "import torch._inductor", "from torch.utils import _pytree", "torch._foo()"]
)
def test_each_way_to_a_private_module_would_be_noticed(source: str) -> None:
    assert [*private_torch(source)]


def test_an_init_is_a_caption_or_offers_promised_names() -> None:
    for path in (path for path in SOURCES if path.name == "__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.Module(body, [])), path
        assert len(body) == 1 or str(path.relative_to(ROOT)) in PROMISED, path


def questions(source: str) -> Iterator[str]:
    """First lines of a source's docstrings that begin with a pronoun, in place of a verb or a noun."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if PRONOUNS.match(first):
                yield first


def test_no_docstring_begins_with_a_pronoun() -> None:
    paths = [path for folder in DOCUMENTED for path in sorted((ROOT / folder).rglob("*.py"))]
    assert paths
    assert not {
        str(path.relative_to(ROOT)): lines for path in paths if (lines := [*questions(path.read_text("utf-8"))])
    }


@pytest.mark.parametrize(
    "source",
    [
        '"""What a step did."""',
        'class Layout:\n    """Who holds what."""',
        'def f():\n    """Whether it is."""',
        'async def f():\n    """\n    How many there are.\n    """',
        'class A:\n    def f(self):\n        """Nobody reads it; see there."""',
    ],
)
def test_each_docstring_that_begins_with_a_pronoun_would_be_noticed(source: str) -> None:
    assert [*questions(source)]


def unfinished(source: str) -> Iterator[str]:
    """First lines of a source's docstrings that break off in a sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if first and not first.rstrip().endswith((".", ":", ")", "]", "`", "?")):
                yield first


def test_the_first_line_of_a_docstring_is_whole() -> None:
    """It is what `help`, editors and the layout page show."""
    paths = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
    assert not {
        str(path.relative_to(ROOT)): lines for path in paths if (lines := [*unfinished(path.read_text("utf-8"))])
    }
    assert [*unfinished('"""A line that goes on\nbelow."""')]


@pytest.mark.parametrize("first", ["True if it is.", "Whole state.", "However large.", "The rank, and what it holds."])
def test_other_first_lines_are_not_noticed(first: str) -> None:
    assert not [*questions(f'def f():\n    """{first}"""\n    "What a text is."')]


@pytest.mark.parametrize(
    "place", ["tiny_onn_func", "training", *sorted({str(p.parent.relative_to(ROOT)) for p in SOURCES})]
)
def test_a_room_shows_few_entries(place: str) -> None:
    entries = [path for path in (ROOT / place).iterdir() if path.name not in ("__pycache__", "__init__.py", "py.typed")]
    assert len(entries) <= 20, sorted(path.name for path in entries)


def test_the_training_package_does_not_import_the_studies_until_they_are_asked_for() -> None:
    program = "import sys, training; assert 'training.study.runner' not in sys.modules; training.run_study"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
