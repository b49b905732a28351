"""What the terminal shows when a run or a score is done."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.run.evaluate import Score

if TYPE_CHECKING:
    from training.replay import Replayed


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


def replay_table(found: "Replayed") -> str:
    """What a step that was made again did: its scalars, its gradients, and whether it is the step on record."""
    lines = [f"step {found.step}, from {found.start}, {found.steps_before} steps made again before it", ""]
    lines += [f"{name:<19} {value}" for name, value in found.record.items() if not isinstance(value, list)]
    lines += ["", f"{'gradient of the main loss':<40} {'largest':>12} {'not finite':>11}"]
    lines += [f"{name:<40} {largest:>12.4g} {bad:>11,}" for name, (largest, bad) in found.gradients.items()]
    lines += ["", f"NaN or infinite: {', '.join(found.bad) or 'nothing'}"]
    if found.differences is None:
        lines.append("on record: no such step")
    else:
        lines.append(f"on record: {'other ' + ', '.join(found.differences) if found.differences else 'the same'}")
    return "\n".join(lines)


def _ranking(bits: Mapping[str, float], num_bytes: int) -> str:
    rows = sorted(bits.items(), key=lambda row: row[1])
    return "\n".join((f"bits per byte on {num_bytes:,} held-out bytes", *(f"  {n:<12} {b:.3f}" for n, b in rows)))
