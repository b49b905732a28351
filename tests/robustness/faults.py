"""Faults on purpose: kills, failing disks, power cuts. Does a run come back from each as if nothing had been?

    python -m tests.robustness.faults [--of run study cache] [--only kills signals spoil tensorboard cuts] [--kills N]
                           [--signals N] [--spoil N] [--cuts N] [--part K/N] [--seed N] [--json FILE]

Every try is a process of its own that runs the command line: a fork of one that has the heavy libraries loaded. The
calls that change files pass through fault_shim.c, which lets a chosen one fail, write half, or be the last. What is
left is resumed, and must end with the bits of the run that met no fault: the last checkpoint's file, the records but
for their seconds, the summary but for its speed, every checkpoint whole, and no leftovers. `--spoil 0` means every call
in every mode, `--cuts 0` a power cut before every one, `--part 2/3` the second third of those.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.robustness.fault_subjects import Ended, Subject, subjects
from tests.robustness.power_cut import cut_before, read_log

READY, SHIM = "TINY_ONN_FAULTS", Path(__file__).with_name("fault_shim.c")
MODES = {
    "fails with EIO": 1, "fails with ENOSPC": 2, "writes half, goes on": 3, "writes half, dies": 4, "dies before": 5,
    "dies after": 6, "disk full from here on": 7,
}  # fmt: skip
TENSORBOARD, BOARD_CALLS = 100, 6  # added to a mode: spoil TensorBoard's files instead; how many of their calls
SLOW, AT_ONCE = 5.0, 1.0  # seconds in which a process that was asked once, or twice, has left
KINDS = ("kills", "signals", "spoil", "tensorboard", "cuts")


class Try(NamedTuple):
    """A fault, and what is wrong after it; nothing, one hopes."""

    fault: str
    outcome: str  # how the process that met it ended
    wrong: list[str]
    kills: int = 0


class Measured(NamedTuple):
    """A subject that met no fault."""

    want: dict[str, Any]
    log: Path
    calls: int
    seconds: float


def outcome_of(ended: Ended) -> tuple[str, list[str]]:
    """How it ended, in words, and what is wrong with that."""
    if ended.status < 0 or ended.status == 137:
        return "killed", []
    lines = ended.said.strip().splitlines()
    last = lines[-1].split("\r")[-1] if lines else ""
    if ended.status == 0:
        return "went on", []
    if ended.status == 130 and last.startswith("stopped; go on with:"):
        return "saved and stopped", []
    if ended.status == 2 and last.startswith("tiny-onn: ") and "Traceback" not in ended.said:
        return "one line, status 2", []
    return f"status {ended.status}", [f"said {ended.said[-300:]!r}"]


def kills(subject: Subject, clean: Measured, number: int, draw: random.Random) -> Iterator[Try]:
    """SIGKILL at a random moment; half of the resumed runs are killed again, twice at most."""
    done = 0
    while done < number:
        subject.wipe()
        times = 0
        for attempt in range(3):
            ended = subject.start(kill=(draw.uniform(0, clean.seconds),))
            times += ended.status < 0
            if ended.status == 0 or attempt == 2 or draw.random() < 0.5:
                break
        done += times
        outcome = ("ended before", "killed once", "killed twice", "killed three times")[times]
        yield Try(f"kill -9, {subject.name}", outcome, subject.resumed(clean.want), times)


def signals(subject: Subject, clean: Measured, tries: int, draw: random.Random) -> Iterator[Try]:
    """SIGINT or SIGTERM at a random moment; a third of them twice."""
    for number in range(tries):
        subject.wipe()
        which = draw.choice((signal.SIGINT, signal.SIGTERM))
        moment = draw.uniform(0.05 * clean.seconds, clean.seconds)
        twice = number % 3 == 0
        moments = (moment, moment + 0.002) if twice else (moment,)
        ended = subject.start(kill=moments, number=which)
        outcome, wrong = outcome_of(ended)
        if ended.status in (130, -which) and not (subject.out / subject.begun).exists():
            outcome, wrong = "stopped before it began", []
        late = ended.seconds - moments[-1]
        if late > (AT_ONCE if ended.status == -which else SLOW):
            wrong = [*wrong, f"left {late:.1f} s after the signal"]
        name = f"{which.name}{' twice' if twice else ''}, {subject.name}"
        yield Try(name, outcome, wrong + subject.resumed(clean.want))


def spoilt(subject: Subject, clean: Measured, points: list[tuple[int, int]], what: int = 0) -> Iterator[Try]:
    """One call that changes files meets a mode, for each (number of the call, mode)."""
    names = {mode: name for name, mode in MODES.items()}
    for number, mode in points:
        subject.wipe()
        outcome, wrong = outcome_of(subject.start(spoil=(number, mode + what)))
        if outcome == "went on":
            have = {name: value for name, value in subject.result().items() if value != "left over"}  # refused removals
            wrong = wrong if have == clean.want else [*wrong, f"call {number}: it went on to another end"]
        where = f"{'TensorBoard' if what else 'a call'} {names[mode]}, {subject.name}"
        yield Try(where, outcome, [f"call {number}: {problem}" for problem in wrong + subject.resumed(clean.want)])


def power_cuts(subject: Subject, clean: Measured, points: list[tuple[int, bool]]) -> Iterator[Try]:
    """The power goes before an operation: what was not flushed is lost, or its name is there without its content."""
    operations = read_log(clean.log)
    for at, names_stay in points:
        subject.wipe()
        cut_before(operations, at, subject.disk, names_stay=names_stay)
        kind = "names stay, content goes" if names_stay else "all that was not flushed goes"
        wrong = [f"operation {at}: {problem}" for problem in subject.resumed(clean.want)]
        yield Try(f"power cut, {kind}, {subject.name}", "cut", wrong)


# The program ----------------------------------------------------------------------------------------------------------


def measured(subject: Subject, home: Path) -> Measured:
    """Let it run to its end: with a cold cache, with a log, and for its time."""
    log = home / f"{subject.name}.log"
    for _ in range(2):
        subject.wipe()
        log.unlink(missing_ok=True)
        ended = subject.start(log=log)
        assert ended.status == 0, ended.said
    want = subject.result()
    subject.wipe()
    seconds = subject.start().seconds
    assert subject.result() == want, "without any fault another end"
    return Measured(want, log, len(read_log(log)), seconds)


def tries_of(subject: Subject, clean: Measured, args: argparse.Namespace, draw: random.Random) -> Iterator[Try]:
    """All that is asked of one subject."""
    part, parts = map(int, args.part.split("/"))

    def sampled(points: list[Any], number: int) -> list[Any]:
        chosen = draw.sample(points, min(number, len(points))) if number else points
        return chosen[part - 1 :: parts]

    if "kills" in args.only and subject.name != "cache":
        yield from kills(subject, clean, args.kills, draw)
    if "signals" in args.only and subject.name != "cache":
        yield from signals(subject, clean, args.signals, draw)
    if "spoil" in args.only:
        points = [(number, mode) for number in range(1, clean.calls + 1) for mode in MODES.values()]
        yield from spoilt(subject, clean, sampled(points, args.spoil))
    if "tensorboard" in args.only and subject.name == "run":
        points = [(number, mode) for number in range(1, BOARD_CALLS + 1) for mode in MODES.values()]
        yield from spoilt(subject, clean, sampled(points, args.spoil and 6), TENSORBOARD)
    if "cuts" in args.only:
        cuts = [(at, names_stay) for at in range(clean.calls + 1) for names_stay in (False, True)]
        yield from power_cuts(subject, clean, sampled(cuts, args.cuts))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", default=["run", "study", "cache"], choices=("run", "study", "cache"))
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--kills", type=int, default=200, help="processes killed by SIGKILL, at least, of a subject")
    parser.add_argument("--signals", type=int, default=40, help="polite signals, of a subject")
    parser.add_argument("--spoil", type=int, default=0, help="spoilt calls; 0: every call in every mode")
    parser.add_argument("--cuts", type=int, default=0, help="power cuts; 0: before every operation, in both ways")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth of the spoilt calls and cuts, from the Kth on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write every try")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    if READY not in os.environ:
        return _with_shim()
    import training.cli
    import training.run.loop
    import training.run.settings
    import training.study.report
    import training.study.runner  # noqa: F401  what every fork would load

    tries = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        for subject in subjects(home):
            if subject.name not in args.of:
                continue
            clean = measured(subject, home)
            print(f"{subject.name}: {clean.calls} calls, {clean.seconds:.2f} s", file=sys.stderr, flush=True)
            for attempt in tries_of(subject, clean, args, random.Random(f"{args.seed} {args.part} {subject.name}")):
                tries.append(attempt)
                for wrong in attempt.wrong:
                    print(f"LOST: {attempt.fault} ({attempt.outcome}): {wrong}", file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps([attempt._asdict() for attempt in tries], indent=1) + "\n", encoding="utf-8"
        )
    print_table(tries)
    return 1 if any(attempt.wrong for attempt in tries) else 0


def print_table(tries: list[Try]) -> None:
    table = Counter((attempt.fault, attempt.outcome) for attempt in tries)
    lost = Counter((attempt.fault, attempt.outcome) for attempt in tries if attempt.wrong)
    print("| fault | outcome | tries | lost or corrupt |\n|---|---|---|---|")
    for (fault, outcome), number in sorted(table.items()):
        print(f"| {fault} | {outcome} | {number} | {lost[fault, outcome]} |")
    print(
        f"\n{len(tries)} tries, {sum(attempt.kills for attempt in tries)} kills, {sum(lost.values())} lost or corrupt"
    )


def _with_shim() -> int:
    """Build the shim and run this program again below it, one thread each, as a fork wants it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        print("faults: expected a C compiler called cc or gcc, found none; install one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder, "fault_shim.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-lpthread"], check=True)
        environment = os.environ | {READY: "1", "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "tests.robustness.faults", *sys.argv[1:]], env=environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
