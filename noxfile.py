"""Longer checks, and other versions than those of constraints.txt: `pip install nox`, then `nox -l` lists the sessions.

    nox -s lint                                  # ruff, typos, mypy, import-linter
    nox -s coverage                              # lines and branches that the suite runs, in twice its time
    nox -s mutation -- FOLDER [--language c]     # tests/mutation/run.py, hours
    nox -s "tests-3.12(torch='2.11.0')"          # the suite on one pair of versions
    nox -s constraints                           # write constraints.txt anew

PyPI's torch is a CUDA build of several gigabytes on Linux; a CPU build is taken where pip is told of one.
"""

import re
from pathlib import Path

import nox

nox.options.sessions = ["lint"]
TORCH = ["2.11.0", "2.13.0", "2.14.1", "2.15.0"]  # lowest to newest
EXTRAS = ".[dev,hf,data,cluster]"
OWN = re.compile(r"(torch|nvidia|cuda|triton|setuptools)[-_\w]*==")  # follow torch's version


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("torch", TORCH)
def tests(session: nox.Session, torch: str) -> None:
    """The suite with the versions of constraints.txt, but for torch."""
    lines = Path("constraints.txt").read_text(encoding="ascii").splitlines()
    others = Path(session.create_tmp(), "constraints.txt")
    others.write_text("\n".join(line for line in lines if not OWN.match(line)) + "\n", encoding="ascii")
    session.install("-e", EXTRAS, f"torch=={torch}", "-c", str(others))
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """The share of lines and branches that the default run meets; programs that tests start are not counted."""
    session.install("-e", EXTRAS, "-c", "constraints.txt")
    session.run("pytest", "-n", "2", "--cov", "--cov-report=term:skip-covered", *session.posargs)


@nox.session(python="3.11")
def mutation(session: nox.Session) -> None:
    """The share of a seeded sample of faults that the suite notices."""
    session.install("-e", EXTRAS, "-c", "constraints.txt")
    session.install(
        "universalmutator"
    )  # for --language c; it brings a backport of `typing` that others should not have
    session.run("python", "-m", "tests.mutation.run", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """What `.ci/run` checks beside the tests."""
    session.install("-e", EXTRAS, "-c", "constraints.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("typos")
    session.run("mypy", "tiny_onn_func", "training", "benchmarks", "examples")
    session.run("lint-imports")


@nox.session(python="3.11")
def constraints(session: nox.Session) -> None:
    """Write constraints.txt: the newest versions that pyproject.toml admits, with the torch that was tested."""
    path = Path("constraints.txt")
    lines = path.read_text(encoding="ascii").splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    session.install("-e", EXTRAS, torch)
    frozen = session.run("python", "-m", "pip", "freeze", "--exclude-editable", silent=True)
    assert isinstance(frozen, str)
    names = (line.partition("+")[0] for line in frozen.splitlines() if "==" in line)
    path.write_text("\n".join([lines[0], *sorted(names, key=str.lower)]) + "\n", encoding="ascii")
