"""The analysis of a study as text for the terminal: a line an arm, the answer, warnings."""

import math
from collections.abc import Mapping
from typing import Any

from training.report.html.wording import level_note, speedup_bounds, speedup_text


def study_table(analysis: Mapping[str, Any]) -> str:
    """The analysis for the terminal: one line an arm, the best first."""
    head = ["arm", "n", "nats per token", "95 % interval", "difference", "95 % interval", "avg K", "regret", "verdict"]
    head[6:6] = ["speed-up", "95 % interval"]
    lines = [head]
    order = sorted(analysis["arms"].items(), key=lambda item: math.inf if item[1]["mean"] is None else item[1]["mean"])
    for label, arm in order:
        pair = analysis["against_baseline"].get(label, {"verdict": "baseline"})
        name = label + "".join(f" ({key.rpartition('.')[2]} {value})" for key, value in arm["tuned"].items())
        verdict = pair["verdict"] + (f", {arm['diverged']} diverged" if arm["diverged"] else "")
        lines.append([
            name, str(arm["n"]), _number(arm["mean"]), _bounds(arm), _number(pair.get("difference"), "+.4f"),
            _bounds(pair, "+.4f") + level_note(pair), speedup_text(pair.get("effective_speedup")),
            speedup_bounds(pair.get("effective_speedup")), _number(arm["avg_k"], ".2f"), _number(arm["regret"], ".3f"),
            verdict,
        ])  # fmt: skip
    optional = (6, 7, 9)  # speed-up with its interval, and regret: left out where none is known
    kept = [column for column in range(len(head)) if column not in optional or any(row[column] for row in lines[1:])]
    lines = [[line[column] for column in kept] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(kept))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = [analysis["note"]] if analysis.get("note") else []
    warnings = [f"warning: {line}" for line in analysis.get("warnings", ())]
    return "\n".join([*text, "", analysis["answer"], *note, *warnings])


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _bounds(entry: Mapping[str, Any], form: str = ".4f") -> str:
    return "" if entry.get("low") is None else f"{entry['low']:{form}} to {entry['high']:{form}}"
