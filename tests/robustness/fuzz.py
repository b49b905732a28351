"""Hostile and broken input: does every reader give a value or one line, quickly, in little memory, touching nothing?

    python -m tests.robustness.fuzz [--inputs N] [--only READER ...] [--seed N] [--json FILE]

Files that are right are spoilt by hypothesis (tests/robustness/hostile.py), and of a fault the smallest input is shown:
bytes changed, cut, doubled, moved; values of JSON and YAML replaced by hostile ones, keys renamed, added, taken away;
symlinks, folders and pipes put where files were. A reader may return, or raise what
the command line prints as one line: UserError, ValueError, OSError. Anything else is a fault: another exception, a
warning, more than TOO_LONG, a process started, a pickle looked at, a file written outside the input's own folder.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness.fuzz_readers import Reader, readers
from tests.robustness.hostile import put, spoilt_files
from training.errors import UserError

TOO_LONG, HANGS = 5.0, 60.0  # seconds of one input: of the processor, and on the clock, whoever else is busy
TOO_MUCH = 300  # MiB that a reader may grow by, over all
LIMIT = 8 << 30  # bytes of data that the whole process may have: what asks for more meets a MemoryError
COLUMNS = ("reader", "inputs", "accepted", "refused by name", "refused plainly", "MiB", "s", "faults")


class Watch:
    """What the interpreter does behind a reader's back."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.fork", "pickle.find_class", "socket.connect"):
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            outside = not Path(arguments[0]).absolute().is_relative_to(self.allowed)
            if writes and outside and arguments[0] != os.devnull:
                self.seen.append(f"writes {arguments[0]}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.symlink", "os.truncate"):
            path = arguments[1] if event == "os.rename" else arguments[0]
            folder = (
                arguments[-1] if event in ("os.remove", "os.rmdir") else None
            )  # shutil.rmtree goes down by descriptors
            inside = isinstance(folder, int) and folder >= 0 and os.path.realpath(f"/proc/self/fd/{folder}")
            if isinstance(path, str) and not Path(inside or "", path).absolute().is_relative_to(self.allowed):
                self.seen.append(f"{event} {path}")


@contextmanager
def limited(busy: float, waiting: float) -> Iterator[None]:
    """Raise Hung when the body takes longer: seconds of the processor, and seconds on the clock."""

    def late(*_: object) -> None:
        raise Hung

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, busy), (signal.SIGALRM, signal.ITIMER_REAL, waiting))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for (number, _, _), old in zip(timers, before, strict=True):
            signal.signal(number, old)


class Hung(BaseException):
    """It took too long."""


class Outcome(NamedTuple):
    """What became of all inputs of a reader."""

    inputs: int
    accepted: int
    refused: int  # in one line of our own
    plain: int  # ValueError or OSError of a library, which the command line prints as one line
    growth: int  # MiB of peak memory
    seconds: float
    faults: list[str]


def fuzz(name: str, reader: Reader, inputs: int, seed: int, watch: Watch, home: Path) -> Outcome:
    """Spoil, read, judge; then the files are put right again."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    scratch = home / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(reader.folder, scratch, ignore=shutil.ignore_patterns("tensorboard", "*.png", "report.html"))
    verdict, fault = judged(partial(reader.read, scratch), watch, scratch)
    assert verdict == "accepted", f"{name}: what is right is {verdict}: {fault}"
    start, before = time.perf_counter(), peak_memory(reset=True)

    @hypothesis.seed(seed)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.sampled_from(reader.targets).flatmap(lambda at: st.tuples(st.just(at), spoilt_files(reader.folder / at))))
    def read_spoilt(drawn: tuple[str, bytes | str]) -> None:
        target, spoilt = drawn
        put(scratch / target, spoilt)
        verdict, fault = judged(partial(reader.read, scratch), watch, scratch)
        counts[verdict] += 1
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        for path in reader.targets:
            put_right(reader.folder / path, scratch / path)
        assert not fault, f"{target}, {spoilt[:2000]!r}: {fault}"

    try:
        read_spoilt()
    except* AssertionError as group:
        faults += [str(error) for error in group.exceptions]
    gc.collect()
    growth = (peak_memory() - before) >> 20
    if growth > TOO_MUCH:
        faults.append(f"grew by {growth} MiB")
    seconds = time.perf_counter() - start
    return Outcome(counts.total(), counts["accepted"], counts["refused"], counts["plain"], growth, seconds, faults)


def put_right(right: Path, spoilt: Path) -> None:
    """A copy of what was right, whatever is there now."""
    if spoilt.is_dir() and not spoilt.is_symlink():
        spoilt.rmdir()
    spoilt.unlink(missing_ok=True)
    shutil.copyfile(right, spoilt)


def peak_memory(*, reset: bool = False) -> int:
    """The most bytes that this process had in memory since the last reset, where the system can forget."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def judged(read: Callable[[], object], watch: Watch, allowed: Path) -> tuple[str, str]:
    """accepted, refused, plain or fault, and the fault in words."""
    watch.allowed, watch.seen = allowed, []
    try:
        with limited(TOO_LONG, HANGS), warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("error")
            read()
        verdict, fault = "accepted", ""
    except UserError as error:
        line = str(error)
        verdict, fault = "refused", "" if line and line.isprintable() and len(line) < 2100 else f"said {line[:200]!r}"
    except (ValueError, OSError) as error:
        verdict, fault = "plain", ""
        if isinstance(error, OSError) and error.errno is None:
            verdict, fault = "fault", f"{type(error).__name__} that says nothing: {error}"
    except Hung:
        verdict, fault = "fault", f"took more than {TOO_LONG} s of the processor, or {HANGS} s"
    except BaseException as error:
        verdict, fault = "fault", f"{type(error).__name__}: {str(error)[:200]!r}{_place(error)}"
    finally:
        watch.allowed = None
    if watch.seen:
        verdict, fault = "fault", watch.seen[0]
    return verdict, fault


def _place(error: BaseException) -> str:
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " at " + " > ".join(places[-4:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="of every reader")
    parser.add_argument("--only", nargs="+", metavar="READER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write the outcomes")
    args = parser.parse_args()
    given(st.text())(lambda _: None)()  # hypothesis reads its tables of letters, which no reader should answer for
    watch, outcomes = Watch(), {}
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        os.environ |= {"TINY_ONN_CACHE": str(home / "cache"), "TINY_ONN_NATIVE": "0"}
        for name, reader in readers(home).items():
            if args.only and name not in args.only:
                continue
            outcome = fuzz(name, reader, args.inputs, args.seed, watch, home)
            outcomes[name] = outcome
            cells = (name, *outcome[:5], round(outcome.seconds), len(outcome.faults))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            for fault in outcome.faults[:10]:
                print(f"FAULT: {name}: {fault}", file=sys.stderr, flush=True)
    if args.json:
        text = json.dumps({name: outcome._asdict() for name, outcome in outcomes.items()}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 1 if any(outcome.faults for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
