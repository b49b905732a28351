"""Further analysis of a finished study: any two arms paired, and the quality of the experts that surprise prefers.

    python -m benchmarks.experiments.compare DIR [--pair ARM OTHER]... [--measure nats_per_token]

Without --pair: for every arm, and for all runs together, how much of a token's own loss one saves by sending it alone
to the visited expert that a value prefers, instead of to a visited expert at random. Nats per sampled token, mean over
the runs with a 95 % t-interval; `visited best` is the most that there is to save, agreement the rank correlation
(Kendall's tau) with the experts' true losses.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.step.surprise import MEASURED
from training.storage.regular_file import read_object
from training.storage.results import FINISHED, Row, read_results
from training.study.analysis import paired_differences, read_facts
from training.study.comparison.statistics import Values, t_interval

VALUES = (*MEASURED, "visited best")
AGREEING = ("w2", "benefit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a study")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("ARM", "OTHER"), default=[])
    parser.add_argument("--measure", default="nats_per_token", help="column of results.csv")
    args = parser.parse_args()
    rows = compared(args.folder)
    for arm, other in args.pair:
        print(f"{args.measure}, {arm} - {other}: {paired(rows, arm, other, args.measure)}")
    if not args.pair:
        facts, _ = read_facts(args.folder, [row["run"] for row in rows])
        print("\n".join(savings(rows, facts)))


def compared(folder: Path) -> list[Row]:
    """Rows of the runs that the study compares: those of its tuning are no pairs."""
    arms = read_object(folder / "analysis.json")["arms"].values()
    runs = {run for arm in arms for run in arm["runs"]}
    return [row for row in read_results(folder) if row["run"] in runs]


def paired(rows: Sequence[Row], arm: str, other: str, measure: str) -> str:
    """Mean difference of runs that share everything but the arm, with its interval, as in a study's analysis."""
    ours, theirs = ([row for row in rows if row["arm"] == name] for name in (arm, other))
    differences = paired_differences(ours, theirs, measure)
    orders = f" of {differences.shape[1]} orders" if differences.shape[1] > 1 else ""
    return f"{interval(differences)}, {len(differences)} pairs{orders}" if len(differences) else "no pairs"


def savings(rows: Sequence[Row], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table; runs whose tokens have no choice among experts are left out."""
    done = [row for row in rows if row["status"] == FINISHED and row["run"] in facts]
    known = [row for row in done if agreement(facts[row["run"]], "w2") is not None]
    head = ("arm", "runs", *VALUES, *(f"agreement of {value}" for value in AGREEING))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in (*dict.fromkeys(row["arm"] for row in known), None):
        chosen = [facts[row["run"]] for row in known if arm in (row["arm"], None)]
        saved = [
            interval([routing["regret"]["visited random"] - routing["regret"][value] for routing in chosen])
            for value in VALUES
        ]
        agreements = [[agreement(routing, value) for routing in chosen] for value in AGREEING]
        agreed = [interval([tau for tau in taus if tau is not None]) for taus in agreements]
        lines.append(f"| {' | '.join((arm or 'all', str(len(chosen)), *saved, *agreed))} |")
    return lines


def agreement(facts: Mapping[str, Any], value: str) -> float | None:
    """Kendall's tau of a value's ranking with that of the experts' true losses; None if there is no pair to rank."""
    kinds = facts["agreement"]["kinds"]
    return facts["agreement"]["tau"][kinds.index(value)][kinds.index("oracle")]


def interval(values: Values) -> str:
    mean, low, high = t_interval(values)
    bounds = "no interval" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
    return f"{mean:+.3f} ({bounds})"


if __name__ == "__main__":
    main()
