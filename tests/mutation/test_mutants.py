"""The mutation score is that of a seeded sample, whose faults meet the tests that run their lines."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.mutation.mutants import Mutant, c_mutants, draw_python
from tests.mutation.run import chosen

SOURCE = "def f(x: int | None, *, y: int = 1) -> int:\n    return x + y if x > 0 else 0\n"
C_SOURCE = "int f(int x, int y)\n{\n    return x + y;\n}\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of a function and its test, under the names of this one's."""
    files = {
        "tiny_onn_func/__init__.py": "",
        "tiny_onn_func/small.py": SOURCE,
        "training/step/__init__.py": "",
        "tests/test_small.py": "from tiny_onn_func.small import f\ndef test_f(): assert (f(2), f(0)) == (3, 0)\n",
        "pyproject.toml": "",
    }
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text, encoding="utf-8")
    return tmp_path / "tree"


def test_a_draw_is_a_function_of_its_seed_and_each_mutant_is_python_with_one_fault_outside_annotations(
    tree: Path,
) -> None:
    drawn = draw_python(tree, 20, seed=1)
    assert drawn == draw_python(tree, 20, seed=1) != draw_python(tree, 20, seed=2)
    right = ast.parse(SOURCE)
    assert isinstance(right.body[0], ast.FunctionDef)
    for mutant in drawn:
        wrong = ast.parse(mutant.source)
        assert ast.dump(wrong) != ast.dump(right), mutant
        assert isinstance(wrong.body[0], ast.FunctionDef)
        assert [ast.dump(a) for a in wrong.body[0].args.args] == [ast.dump(a) for a in right.body[0].args.args]


def test_a_mutant_of_c_changes_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """universalmutator is no dependency: a stand-in of its function, which gives (number from 1, new line, rule)."""

    def mutants_regexp(lines: list[str], **options: Any) -> list[tuple[int, str, str]]:
        return [(at, line.replace("+", new), "rule") for at, line in enumerate(lines, 1) for new in "-*" if "+" in line]

    monkeypatch.setitem(sys.modules, "universalmutator", ModuleType("universalmutator"))
    monkeypatch.setitem(sys.modules, "universalmutator.mutator", SimpleNamespace(mutants_regexp=mutants_regexp))
    (tmp_path / "small.c").write_text(C_SOURCE, encoding="utf-8")
    mutants = [*c_mutants(tmp_path / "small.c")]
    assert {mutant.source.splitlines()[2].strip() for mutant in mutants} == {"return x - y;", "return x * y;"}
    lines = C_SOURCE.splitlines(keepends=True)
    for mutant in mutants:
        assert mutant.source.startswith("".join(lines[: mutant.line - 1]))
        assert mutant.source.endswith("".join(lines[mutant.line :]))
        assert mutant.source != C_SOURCE


def test_a_mutant_meets_the_tests_of_its_line_those_of_its_room_first_as_long_as_there_is_time() -> None:
    near, slow, far = (
        "tests/training/step/test_a.py::near",
        "tests/training/step/test_b.py::slow",
        "tests/test_c.py::far",
    )
    lines = {"training/step/a.py": {3: {far, near, slow}, 5: set(), 7: {far}}}
    seconds = {near: 2.0, slow: 9.0, far: 1.0}
    mutant = Mutant("training/step/a.py", 3, "", "")
    assert chosen(mutant, lines, seconds, 60) == [near, slow, far]
    assert chosen(mutant, lines, seconds, 10) == [near, slow]
    assert chosen(mutant._replace(line=5), lines, seconds, 60) == [near, slow, far]  # within a statement of line 3
    assert chosen(mutant._replace(line=8), lines, seconds, 60) == [far]


@pytest.mark.parametrize(
    ("source", "noticed"),
    [(SOURCE, False), (SOURCE.replace("x + y", "x - y"), True), ("while True:\n    pass\n", True), ("1 / 0\n", True)],
    ids=["right", "wrong", "endless", "broken"],
)
def test_a_fault_is_noticed_by_a_test_that_fails_or_does_not_end(source: str, noticed: bool, tree: Path) -> None:
    limit = 3 if "while" in source else 60  # seconds of the processor
    program = f"""
from pathlib import Path
from tests.mutation.run import Mutant, verdict
mutant = Mutant("tiny_onn_func/small.py", 2, "", {source!r})
print(verdict(Path({str(tree.parent)!r}), mutant, ["tests/test_small.py::test_f"], {limit})[0])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.stdout == f"{noticed}\n", ended.stderr
    assert (tree / "tiny_onn_func/small.py").read_text(encoding="utf-8") == SOURCE
