"""Does the suite notice a fault? `python -m tests.mutation.run [--only TEXT] [--jobs N] [--seconds S]`

A copy of the project gets one mutant at a time, and the tests that should notice it run until the first failure. A
mutant that no test notices has survived; a run that outlasts the limit counts as noticed, since it would hang in CI.
The heavy libraries are imported once and every run is a fork, so that a mutant costs seconds.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT
from tests.mutation.mutants import MUTANTS, TESTS, Mutant

LEAST_KILLED = 0.95
BROKEN = 70  # exit status of a run that could not even start
# a failing example is not shrunk, and asserts of modules that are imported already cannot be rewritten
OPTIONS = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]


class Outcome(NamedTuple):
    mutant: Mutant
    killed_by: str | None
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file or text holds this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run")
    args = parser.parse_args()
    import_heavy_libraries()
    chosen = [m for m in MUTANTS if args.only in f"{m.file} {m.old} -> {m.new}"]
    outcomes = []
    for outcome in run_all(chosen, args.jobs, args.seconds):
        outcomes.append(outcome)
        print(
            f"{outcome.seconds:6.0f} s  {describe(outcome.mutant)}\n          {outcome.killed_by or 'SURVIVED'}",
            flush=True,
        )
    killed = sum(outcome.killed_by is not None for outcome in outcomes)
    print(f"\n{killed} of {len(outcomes)} mutants killed ({killed / max(len(outcomes), 1):.1%})")
    for outcome in outcomes:
        if outcome.killed_by is None:
            print(f"survived: {describe(outcome.mutant)}")
    return 0 if killed >= LEAST_KILLED * len(outcomes) else 1


def import_heavy_libraries() -> None:
    """All that the tests import, but the project itself; a fork must not inherit threads at work."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import beartype  # noqa: F401
    import einops  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import jaxtyping  # noqa: F401
    import pytest  # noqa: F401
    import torch.func
    from torch._functorch import autograd_function  # noqa: F401

    torch.set_num_threads(1)
    torch.func.grad(torch.sum)(torch.ones(2))  # imports what torch imports late


def run_all(mutants: list[Mutant], jobs: int, limit: float) -> Iterator[Outcome]:
    """Every mutant's outcome, in the order in which they end."""
    waiting = list(reversed(mutants))
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, folder = waiting.pop(), Path(tempfile.mkdtemp(prefix="mutant-"))
            running[start(mutant, folder)] = (mutant, folder, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        for late, (_, _, begin) in running.items():
            if time.monotonic() - begin > limit:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(late, signal.SIGKILL)
        if pid == 0:
            time.sleep(0.2)
            continue
        mutant, folder, begin = running.pop(pid)
        yield Outcome(mutant, verdict(folder, status), time.monotonic() - begin)
        shutil.rmtree(folder)


def start(mutant: Mutant, folder: Path) -> int:
    """The process that runs the tests of a mutant, in a private copy of the project."""
    for name in ("tiny_onn_func", "training", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    source = folder / mutant.file
    source.write_text(apply(mutant, source.read_text()))
    pid = os.fork()
    if pid == 0:
        status = BROKEN
        is_native = not mutant.file.endswith(".py")
        if is_native:
            os.environ["TINY_ONN_NATIVE_CACHE"] = str(folder / "native")  # compiled for this run alone
        try:
            status = run_tests(folder, [test_file(name) for name in TESTS[mutant.file]], is_native)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def test_file(name: str) -> str:
    """Path of the test file of that name, relative to the project."""
    (path,) = (ROOT / "tests").rglob(f"test_{name}.py")
    return str(path.relative_to(ROOT))


def run_tests(folder: Path, files: list[str], is_native: bool) -> int:
    """Pytest in this process, on the project in `folder`; its output goes to a file there."""
    import pytest

    os.environ["HYPOTHESIS_PROFILE"] = "mutation"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "training", "tiny_onn_func")]:
        del sys.modules[name]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main([*OPTIONS, *files])
    (folder / "output.txt").write_text(output.getvalue())
    if is_native:  # a mutant that does not compile leaves the kernels out, and would count as survived
        import_module("tiny_onn_func.kernels.build").find_library()
    return int(status)


def verdict(folder: Path, status: int) -> str | None:
    """What noticed the mutant; None if nothing did."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}: a crash, or the limit of time"
    if os.WEXITSTATUS(status) == 0:
        return None
    if os.WEXITSTATUS(status) == BROKEN:
        raise RuntimeError("pytest itself failed; what it printed stands above")
    lines = (folder / "output.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "no output")


def apply(mutant: Mutant, source: str) -> str:
    """The source with the fault in it."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: expected {mutant.old!r} once, got it {source.count(mutant.old)} times")
    return source.replace(mutant.old, mutant.new)


def describe(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}"


if __name__ == "__main__":
    sys.exit(main())
