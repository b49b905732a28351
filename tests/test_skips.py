"""No silent skips: every skip names what it lacks, and in CI one that is not on the list fails the session."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ALLOWED_SKIPS
from tests.helpers import ROOT

TESTS = """
import pytest

def test_that_runs():
    pass

@pytest.mark.xfail(reason="known")
def test_that_fails_as_expected():
    assert False

@pytest.mark.skipif(True, reason="{mark}")
def test_with_a_mark():
    pass

def test_that_skips_itself():
    pytest.skip("{call}")
"""
FINE = {"mark": "no CUDA device", "call": "no CUDA device of 80 GiB"}


def run_tests(folder: Path, *flags: str, **variables: str) -> tuple[int, list[str]]:
    """Status and refusals of a session in a folder with this project's conftest."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    environment = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *flags]
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
    return done.returncode, [line for line in done.stdout.splitlines() if "SKIP REFUSED" in line]


@pytest.mark.parametrize("flags", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_skip_that_is_not_on_the_list_fails_the_session_and_is_named(tmp_path: Path, flags: tuple[str, ...]) -> None:
    skipping = TESTS.format(**FINE | {"call": "no moon"})
    (tmp_path / "test_it.py").write_text(skipping, encoding="utf-8")
    status, (line,) = run_tests(tmp_path, "--allowed-skips", *flags)
    assert status == 1
    assert line.startswith("SKIP REFUSED test_it.py::test_that_skips_itself: expected no skip, got 'no moon'; ")


@pytest.mark.parametrize("flags", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_file_that_skips_as_a_whole_is_refused_too(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\npytest.importorskip('no_such_package')\n", encoding="utf-8")
    status, (line,) = run_tests(tmp_path, *flags, CI="true")
    assert status == 1
    assert line.startswith("SKIP REFUSED test_it.py: ")
    assert "no_such_package" in line


def test_listed_skips_and_expected_failures_pass_and_so_does_any_skip_outside_ci(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(**FINE), encoding="utf-8")
    assert run_tests(tmp_path, "--allowed-skips") == (0, [])
    (tmp_path / "test_it.py").write_text(TESTS.format(mark="no sun", call="no moon"), encoding="utf-8")
    assert run_tests(tmp_path) == (0, [])
    assert run_tests(tmp_path, CI="false") == (0, [])


def test_ci_asks_for_the_check_and_the_list_is_short_and_reasoned() -> None:
    assert "pytest -n 2 --allowed-skips" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(ALLOWED_SKIPS) <= 5
    assert all(reason.startswith("no ") and why for reason, why in ALLOWED_SKIPS.items())


CALLS = ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif")


def skips(source: str) -> Iterator[str | None]:
    """The reason of each skip in a source; None where there is none."""
    nodes = [*ast.walk(ast.parse(source))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS]
    for node in calls:
        texts = [key.value for key in node.keywords if key.arg == "reason"]
        texts += [] if ast.unparse(node.func) == "pytest.mark.skipif" else node.args[:1]
        yield str(ast.literal_eval(texts[0])) if texts else None
    called = {id(node.func) for node in calls}
    bare = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS]
    yield from (None for node in bare if id(node) not in called)


def test_every_skip_names_what_it_lacks() -> None:
    reasons = {
        (path.name, reason)
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != Path(__file__).name
        for reason in skips(path.read_text(encoding="utf-8"))
    }
    assert len(reasons) >= 5
    assert {(name, reason) for name, reason in reasons if not (reason or "").startswith("no ")} == set()


@pytest.mark.parametrize("source", ["@pytest.mark.skip\ndef f(): pass", "pytest.skip()", "pytest.mark.skipif(True)"])
def test_a_skip_without_a_reason_would_be_noticed(source: str) -> None:
    assert None in skips(source)
