"""Results of a study -> analysis.json: intervals, differences paired by seed, equivalence, verdicts, an answer.

Arms are compared by held-out nats per token; less is better. An arm's difference to the baseline is the mean over seeds
of (arm - baseline) at the same seed, hence the same data order. In a stream the nats are the mean over all tasks at the
end, and a pair has the same seed and the same order of the tasks.

- better, worse: the paired t-test rejects no difference at 5 %, corrected for the number of arms (Holm), and the
  difference is not shown to be within the margin. `beyond_margin`: the whole interval is beyond the margin.
- equivalent: two one-sided t-tests (TOST) at 5 % put the difference within the margin, which was set before the runs.
- identical: every pair has the same score to the last digit, so what the arm changes had no effect.
- undecided: neither; also with fewer than two pairs, or when a run of the arm diverged.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from training.arm_facts import mean_facts, read_facts
from training.continual import Continual
from training.durable import write_text
from training.statistics import CONFIDENCE, Interval, holm, t_interval, t_test, tost
from training.study_config import StudyConfig, baselines_of, expand
from training.study_results import DIVERGED, FINISHED, Row, pair_key, read_results

LEVEL = 0.05  # of both tests
MATCHED = 0.05  # avg_k, or the operations of a forward pass, within this share of the baseline's count as equal
MEASURE = "nats_per_token"
BESIDE = (
    "bits_per_byte",
    "avg_k",
    "max_vio",
    "dead_experts",
    "gating_acc",
    "gating_trivial",
    "active_parameters",
    "flops_per_token",
    "load_entropy",
    "regret",
    "regret_random",
    "regret_w2",
    "oracle_hits",
    "co_activation",
    "routing_drift",
    "seconds",
)


def analyse(folder: str | Path) -> dict[str, Any]:
    """The analysis of a study's folder, which is also written there as analysis.json."""
    from training.study_file import load_study

    folder = Path(folder)
    rows = read_results(folder)
    facts = read_facts(folder, [row["run"] for row in rows])
    analysis = analyse_rows(load_study(folder / "study.yaml"), rows, facts)
    write_text(folder / "analysis.json", json.dumps(analysis, indent=2) + "\n")
    return analysis


def analyse_rows(
    study: StudyConfig, rows: Sequence[Row], facts: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The values of analysis.json, from the rows of results.csv (numbers, or their text) and runs' routing facts."""
    by_label: dict[str, list[Row]] = {}
    for run, row in zip(expand(study), rows, strict=True):
        by_label.setdefault(run.arm, []).append(row)
    chosen = {label: _best_point(found, study.tune) for label, found in by_label.items()}
    arms = {label: _describe(found, study.tune, facts or {}) for label, found in chosen.items()}
    baselines = baselines_of(study)
    against = {
        label: _compare(chosen[label], chosen[other], study.margin) | {"baseline": other}
        for label, other in baselines.items()
        if label != other
    }
    corrected = holm({label: found["p"] for label, found in against.items() if found["p"] is not None})
    for label, found in against.items():
        found["p_holm"] = corrected.get(label)
        found["verdict"] = _verdict(found, arms[label]["diverged"] + arms[baselines[label]]["diverged"])
        for key, measure in {"k_matched": "avg_k", "flops_matched": "flops_per_token"}.items():
            ours, theirs = arms[label][measure], arms[baselines[label]][measure]
            found[key] = None if ours is None or not theirs else abs(ours / theirs - 1) <= MATCHED
    stream = {"continual": _continual(chosen, baselines)} if study.tasks else {}
    facts = {key: getattr(study, key) for key in ("name", "question", "margin", "falsifier")}
    baseline = study.baseline or next(iter(baselines.values()))
    return {
        **facts, "baseline": baseline, "measure": MEASURE, "confidence": CONFIDENCE, "tuned": list(study.tune),
        "answer": _answer(against, baseline, study.margin), "arms": arms, "against_baseline": against,
        **stream,
    }  # fmt: skip


def study_table(analysis: Mapping[str, Any]) -> str:
    """The analysis for the terminal: one line an arm, the best first."""
    head = ["arm", "n", "nats per token", "95 % interval", "difference", "95 % interval", "avg K", "regret", "verdict"]
    lines = [head]
    order = sorted(analysis["arms"].items(), key=lambda item: math.inf if item[1]["mean"] is None else item[1]["mean"])
    for label, arm in order:
        pair = analysis["against_baseline"].get(label, {"verdict": "baseline"})
        name = label + "".join(f" ({key.rpartition('.')[2]} {value})" for key, value in arm["tuned"].items())
        verdict = pair["verdict"] + (f", {arm['diverged']} diverged" if arm["diverged"] else "")
        lines.append([
            name, str(arm["n"]), _number(arm["mean"]), _bounds(arm), _number(pair.get("difference"), "+.4f"),
            _bounds(pair, "+.4f"), _number(arm["avg_k"], ".2f"), _number(arm["regret"], ".3f"), verdict,
        ])  # fmt: skip
    if not any(line[7] for line in lines[1:]):  # nothing was analysed
        lines = [line[:7] + line[8:] for line in lines]
    head = lines[0]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", analysis["answer"]])


# Pieces ---------------------------------------------------------------------------------------------------------------


def _best_point(rows: Sequence[Row], tune: Sequence[str]) -> list[Row]:
    """The runs at the tuned axes' values of the lowest mean score; points where a run diverged come last."""
    points: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        points.setdefault(tuple(str(row[key]) for key in tune), []).append(row)

    def rank(found: list[Row]) -> tuple[int, int, float]:
        scores = [*_scores(found).values()]
        lost = sum(row["status"] == DIVERGED for row in found)
        return lost, -len(scores), fmean(scores) if scores else math.inf

    return min(points.values(), key=rank)


def _describe(rows: Sequence[Row], tune: Sequence[str], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores = [*_scores(rows).values()]
    interval = t_interval(scores) if scores else Interval(math.nan, None, None)
    beside = {key: [float(row[key]) for row in rows if row.get(key) not in (None, "")] for key in BESIDE}
    return {
        "mean": interval.mean if scores else None,
        "low": interval.low,
        "high": interval.high,
        "n": len(scores),
        "seeds": len({str(row["seed"]) for row in rows if row["status"] == FINISHED}),
        **{key: fmean(values) if values else None for key, values in beside.items()},
        "diverged": sum(row["status"] == DIVERGED for row in rows),
        "tuned": {key: _plain(rows[0][key]) for key in tune},
        "runs": [row["run"] for row in rows],
        "routing": mean_facts([facts[row["run"]] for row in rows if row["run"] in facts]),
    }


def _compare(ours: Sequence[Row], theirs: Sequence[Row], margin: float) -> dict[str, Any]:
    mine, other = _scores(ours), _scores(theirs)
    differences = [score - other[seed] for seed, score in mine.items() if seed in other]
    if not differences:
        return dict.fromkeys(("difference", "low", "high", "p", "tost_p", "beyond_margin", "identical")) | {"n": 0}
    mean, low, high = t_interval(differences)
    beyond = None if low is None or high is None else high < -margin or low > margin
    return {
        "difference": mean, "low": low, "high": high, "n": len(differences), "p": t_test(differences),
        "tost_p": tost(differences, margin), "beyond_margin": beyond, "identical": not any(differences),
    }  # fmt: skip


def _continual(chosen: Mapping[str, Sequence[Row]], baselines: Mapping[str, str]) -> dict[str, Any]:
    """Arm -> measure of a stream -> its mean and interval, and those of the paired difference to the baseline."""
    found: dict[str, Any] = {}
    for label, rows in chosen.items():
        found[label] = {}
        for measure in Continual._fields:
            mine, other = _values(rows, measure), _values(chosen[baselines[label]], measure)
            pairs = [value - other[key] for key, value in mine.items() if key in other]
            alone = t_interval([*mine.values()]) if mine else Interval(math.nan, None, None)
            against = t_interval(pairs) if pairs and label != baselines[label] else Interval(math.nan, None, None)
            found[label][measure] = {
                "mean": alone.mean if mine else None, "low": alone.low, "high": alone.high, "n": len(mine),
                "difference": None if math.isnan(against.mean) else against.mean,
                "difference_low": against.low, "difference_high": against.high,
            }  # fmt: skip
    return found


def _verdict(pair: Mapping[str, Any], diverged: int) -> str:
    if diverged or pair["p_holm"] is None:
        return "undecided"
    if pair["tost_p"] < LEVEL:
        return "equivalent"
    if pair["p_holm"] < LEVEL:
        return "better" if pair["difference"] < 0 else "worse"
    return "undecided"


MENTIONED = 6  # arms without a verdict that a sentence can name


def _answer(against: Mapping[str, Mapping[str, Any]], baseline: str, margin: float) -> str:
    """One sentence: which arms beat the baseline, and what became of the others."""
    if not against:
        return f"Only {baseline} was run, so nothing is compared."
    parts = []
    for verdict, verb in {
        "better": "better than", "worse": "worse than", "equivalent": f"within {margin:g} nats of",
        "undecided": "not told apart from",
    }.items():  # fmt: skip
        found = sorted(
            (pair["difference"], name)
            for name, pair in against.items()
            if pair["verdict"] == verdict and pair["difference"] is not None
        )
        if len(found) > MENTIONED and verdict == "undecided":
            span = f"{found[0][0]:+.3f} to {found[-1][0]:+.3f}"
            parts.append(f"{len(found)} of {len(against)} {verb} {baseline} ({span})")
        elif found:
            names = ", ".join(f"{name} ({difference:+.3f})" for difference, name in found)
            parts.append(f"{verb} {baseline}: {names}")
        elif verdict == "better":
            parts.append(f"no arm is better than {baseline}")
    if without := [name for name, pair in against.items() if pair["difference"] is None]:
        named = ": " + ", ".join(without) if len(without) <= MENTIONED else ""
        parts.append(f"{len(without)} of {len(against)} without a finished pair of runs{named}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    """Seed (and order of tasks) -> score of the runs that are finished."""
    return _values(rows, MEASURE)


def _values(rows: Sequence[Row], measure: str) -> dict[str, float]:
    return {pair_key(row): float(row[measure]) for row in rows if row["status"] == FINISHED}


def _plain(value: Any) -> Any:
    """A value of results.csv as the number that it spells, if it is one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _bounds(found: Mapping[str, Any], form: str = ".4f") -> str:
    return "" if found.get("low") is None else f"{found['low']:{form}} to {found['high']:{form}}"
