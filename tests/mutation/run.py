"""Score the suite on a seeded random sample of faults: `python -m tests.mutation.run FOLDER [--language python|c]`

FOLDER gets a copy of the project, the sample, and the tests of each line by pytest-cov; a second call goes on where the
first ended. A mutant meets the tests that run its line until one fails: of its own room first, quick ones before slow
ones. One process at a time, a fork with the heavy libraries imported.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import coverage

from tests.mutation.mutants import DRAW, SOURCES, Mutant

ROOT = Path(__file__).parents[2]
MEASURE = ["tests/tiny_onn_func", "tests/training/step", *(f"--cov={name}" for name in SOURCES), "--cov-context=test"]
CALLERS = tuple(f"tiny_onn_func/kernels/{name}.py" for name in ("forward", "step", "decoder", "update"))  # of C
OPTIONS = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
Lines = dict[str, dict[int, set[str]]]  # file -> line -> names of tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language", choices=DRAW, default="python")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--only", default="", help="of the sample the mutants whose file has this in its path")
    parser.add_argument("--seconds", type=float, default=60, help="of tests that a mutant meets at most")
    args = parser.parse_args()
    folder = args.folder.resolve()
    lines, seconds = measure(folder / "tree")
    sample, outcomes = (folder / f"{args.language}-{args.count}-{args.seed}{end}.jsonl" for end in ("", "-outcomes"))
    if not sample.exists():
        drawn = DRAW[args.language](folder / "tree", args.count, args.seed)
        sample.write_text("".join(json.dumps(mutant) + "\n" for mutant in drawn), "utf-8")
    mutants = [Mutant(*json.loads(line)) for line in sample.read_text("utf-8").splitlines()]
    known = {
        n: verdict for n, *verdict in map(json.loads, outcomes.read_text().splitlines() if outcomes.exists() else [])
    }
    import_heavy_libraries()
    for number, mutant in enumerate(mutants):
        if number not in known and args.only in mutant.file:
            begin, names = time.monotonic(), chosen(mutant, lines, seconds, args.seconds)
            known[number] = verdict(folder, mutant, names, 60 + 10 * sum(seconds[name] for name in names))
            with outcomes.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, *known[number]]) + "\n")
            took = f"{time.monotonic() - begin:4.0f} s"
            print(took, *known[number], f"{mutant.file}:{mutant.line}", mutant.change, flush=True)
    killers = {by.removeprefix("FAILED ").partition(" - ")[0] for _, by in known.values() if by.startswith("FAILED ")}
    if killers:
        right = mutants[0]._replace(source=(folder / "tree" / mutants[0].file).read_text("utf-8"))
        fails, by = verdict(folder, right, sorted(killers), 3600)
        print(f"without a fault the tests that noticed one {'FAIL, and no score holds: ' + by if fails else 'pass'}")
    report([(mutants[number], killed) for number, (killed, _) in sorted(known.items())])
    return 0


def measure(tree: Path) -> tuple[Lines, dict[str, float]]:
    """Tests by the lines that they run, and their seconds, measured once in a copy of the project."""
    if not (tree / "tests.xml").exists():
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"))
        command = [sys.executable, "-m", "pytest", "-q", "--cov-report=", "--junitxml=tests.xml", *MEASURE]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(command, cwd=tree, env=environment | {"HYPOTHESIS_PROFILE": "mutation"}, check=False)
    passed = [case for case in ElementTree.parse(tree / "tests.xml").iter("testcase") if not [*case]]
    seconds = {
        f"{c.attrib['classname'].replace('.', '/')}.py::{c.attrib['name']}": float(c.attrib["time"]) for c in passed
    }
    data, lines = coverage.CoverageData(str(tree / ".coverage")), defaultdict[str, dict[int, set[str]]](dict)
    data.read()
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            names = {context.rpartition("|")[0] for context in contexts}
            lines[str(Path(path).relative_to(tree))][line] = names & seconds.keys()
    return lines, seconds


def chosen(mutant: Mutant, lines: Lines, seconds: dict[str, float], most: float) -> list[str]:
    """The tests that run a line: those of its own file, of its room, all others; quick ones first."""
    path = Path(mutant.file)
    if path.suffix == ".py":
        before = sorted((line for line, names in lines[mutant.file].items() if names and line <= mutant.line))
        names = lines[mutant.file][before[-1]] if before else set().union(*lines[mutant.file].values())
    else:
        names = set().union(*(tests for caller in CALLERS for tests in lines[caller].values()))
    room = f"tests/{path.parent}".removesuffix("/csrc")
    ranks = (f"{room}/test_{path.stem}.py", f"{room}/", "tests/")
    rank = {name: next(i for i, start in enumerate(ranks) if name.startswith(start)) for name in names}
    taken: list[str] = []
    for name in sorted(names, key=lambda name: (rank[name], seconds[name], name)):
        if sum(seconds[other] for other in taken) < most:
            taken.append(name)
    return taken


def import_heavy_libraries() -> None:
    """All that the tests import, but the project itself; a fork must not inherit threads at work."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutation", "PYTHONDONTWRITEBYTECODE": "1"}
    import beartype  # noqa: F401
    import einops  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import jaxtyping  # noqa: F401
    import pytest  # noqa: F401
    import torch.func
    from torch._functorch import autograd_function  # noqa: F401

    torch.set_num_threads(1)
    torch.func.grad(torch.sum)(torch.ones(2))  # imports what torch imports late


def verdict(folder: Path, mutant: Mutant, names: list[str], limit: float) -> tuple[bool, str]:
    """True if a test noticed the fault, and which."""
    mutated, said = folder / "mutated", folder / "said.txt"
    shutil.rmtree(mutated, ignore_errors=True)
    shutil.copytree(folder / "tree", mutated, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__"))
    (mutated / mutant.file).unlink()
    (mutated / mutant.file).write_text(mutant.source, "utf-8")
    pid = os.fork()
    if pid == 0:
        os._exit(run_tests(mutated, names, said, int(limit)))
    end, ended = time.monotonic() + 10 * limit, (0, 0)
    while ended[0] == 0:
        time.sleep(0.1)
        ended = os.waitpid(pid, os.WNOHANG)
        if ended[0] == 0 and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
    if os.WIFSIGNALED(ended[1]):
        return True, f"signal {os.WTERMSIG(ended[1])}: a crash, or {limit:.0f} s were over"
    failed = [line for line in said.read_text("utf-8", "replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (False, f"{len(names)} tests passed") if ended[1] == 0 else (True, [*failed, "no test failed"][0])


def run_tests(tree: Path, names: list[str], said: Path, limit: int) -> int:
    """Pytest in this process, on a copy of the project; what it prints goes to a file."""
    import pytest

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "TINY_ONN_NATIVE_CACHE": str(tree.parent / "native")}
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "training", "tiny_onn_func")]:
        del sys.modules[name]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # a machine may be busy: its seconds are not the test's
    status = int(pytest.main([*OPTIONS, *names]))
    sys.stdout.flush()
    return status


def report(outcomes: list[tuple[Mutant, bool]]) -> None:
    """Print the score by file, and the survivors."""
    for file, count in sorted(Counter(mutant.file for mutant, _ in outcomes).items()):
        print(f"{sum(killed for mutant, killed in outcomes if mutant.file == file):4} of {count:3} killed  {file}")
    print(f"{sum(killed for _, killed in outcomes)} of {len(outcomes)} killed")
    for mutant in (mutant for mutant, killed in outcomes if not killed):
        print(f"SURVIVED  {mutant.file}:{mutant.line}  {mutant.change}")


if __name__ == "__main__":
    sys.exit(main())
