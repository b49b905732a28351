"""What the terminal shows when a run or a score is done."""

from collections.abc import Mapping
from typing import Any

from training.evaluate import Score


def score_table(score: Score, baselines: Mapping[str, float]) -> str:
    """Held-out bits per byte of the model among the baselines, best first."""
    return _ranking({"this model": score.bits_per_byte, **baselines}, score.bytes)


def summary_table(summary: Mapping[str, Any], folder: str) -> str:
    """The summary of a run: how good, how fast, how large, a sample, and where everything is."""
    facts = {
        "held-out loss": f"{summary['nats_per_token']:.4f} nats per token",
        "experts per token": f"{summary['avg_k']:.2f}",
        "parameters": f"{summary['parameters']:,} ({summary['active_parameters']:,} active)",
        "trained on": f"{summary['tokens']:,} tokens in {summary['steps']:,} steps",
        "training time": f"{summary['train_seconds']:.1f} s, {summary['tokens_per_second']:,.0f} tokens/s",
        "run folder": folder,
    }
    lines = [_ranking({"this model": summary["bits_per_byte"], **summary["baselines"]}, summary["held_out_bytes"]), ""]
    lines += [f"{name:<18} {value}" for name, value in facts.items()]
    lines += [f"ALARM: {alarm}" for alarm in summary["alarms"]]
    if summary["sample"]:
        lines += ["", "sample:", summary["sample"]]
    return "\n".join(lines)


def _ranking(bits: Mapping[str, float], num_bytes: int) -> str:
    rows = sorted(bits.items(), key=lambda row: row[1])
    return "\n".join((f"bits per byte on {num_bytes:,} held-out bytes", *(f"  {n:<12} {b:.3f}" for n, b in rows)))
