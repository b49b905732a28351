"""End of a run: final score, pictures, sample text, alarms, summary.json."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tiny_onn_func.inference.generate import generate
from tiny_onn_func.params import count_active_params, count_params
from training.data.batches import count_held_out_batches, held_out_batches, scored_span
from training.fields import Field
from training.report.alarms import Guards, collapse_alarms
from training.report.figures import draw_core_metrics, draw_expert_dashboard
from training.run.config import RunConfig, hyper_params
from training.run.context import EarlyStop, Run, best_step
from training.run.evaluate import Score, evaluate, recorded
from training.run.schedule import LEGS
from training.step.hyper_step import TrainState
from training.storage.atomic import write_text
from training.storage.results import MEASURES
from training.terminal import LOG, progress

OF_SCORE = {  # of summary.json, of a run and of a run of a study
    "accuracy": Field("share", "Share of held-out tokens that equal the model's most probable token."),
    "steps": Field("steps", "Steps that were made, the last one included that diverged."),
    "tokens": Field("tokens", "Tokens trained on."),
    "train_seconds": Field("s", "Training time, without scores, pictures and checkpoints."),
    "tokens_per_second": Field("tokens per s", "Speed of the training: `tokens` / `train_seconds`."),
    "parameters": Field("parameters", "All parameters of the model."),
    "held_out_bytes": Field("bytes", "Size of the scored text."),
    "held_out_tokens": Field("tokens", "Targets that were scored."),
    "alarms": Field(
        "list of text",
        "Collapse alarms at the end of the run, a sentence or two each; empty if there is none.",
    ),
}  # fmt: skip
SUMMARY = {
    **{key: MEASURES[key] for key in ("nats_per_token", "bits_per_byte", "avg_k", "active_parameters")},
    **OF_SCORE,
    "best_step": Field("step", "Step of the lowest `held_out_nats` of the records; null without such a score."),
    "stopped": Field("object", "Null, or `step` and `reason` of a run that `stop_when` ended early."),
    LEGS: Field(
        "list of pairs",
        "First step and planned number of steps of each leg: a run that was resumed with other `steps` has several.",
    ),
    "processes": Field("processes", "Processes (ranks) of the run."),
    "bytes_sent_per_step": Field("bytes, by purpose", "Bytes that rank 0 sent in a step; empty on one process."),
    "baselines": Field(
        "bits per byte, by name",
        "Scores of gzip -9, bzip2 -9, xz -9e, bigram, unigram and uniform models on the same bytes.",
    ),
    "sample": Field("text", "The prompt and a sampled continuation."),
}  # fmt: skip


def finish(run: Run, state: TrainState, seconds: float, stopped: EarlyStop | None = None) -> dict[str, Any]:
    """Pictures, the final score, the sample and `summary.json`."""
    config = run.config
    best = best_step(run.history)
    score = held_out_score(run, state, config.final_eval_bytes, show=True)
    if run.history:
        run.history[-1] |= recorded(score)
    draw(run)
    tokens = int(state.step) * run.tokens_a_step
    summary = {
        "bits_per_byte": score.bits_per_byte,
        "nats_per_token": score.nats_per_token,
        "accuracy": score.accuracy,
        "steps": int(state.step),
        "stopped": None if stopped is None else stopped._asdict(),
        LEGS: [list(leg) for leg in run.legs],
        "best_step": best,
        "tokens": tokens,
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "avg_k": score.avg_k,
        "parameters": count_params(config.model),
        "active_parameters": round(count_active_params(config.model, score.avg_k)),
        "processes": run.team.world.size,
        "bytes_sent_per_step": _sent_per_step(run, int(state.step)),
        "held_out_bytes": score.bytes,
        "held_out_tokens": score.tokens,
        "baselines": run.baselines,
        "alarms": alarms(run.history, config),
        "sample": _sample(run, state) if config.sample_tokens else "",
    }
    write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _sent_per_step(run: Run, step: int) -> dict[str, int]:
    """Bytes that rank 0 sent per step, by purpose; empty for a single process."""
    return {purpose: round(n / max(1, step - run.first_step)) for purpose, n in run.team.world.sent.items()}


def held_out_score(run: Run, state: TrainState, max_bytes: int | None, *, show: bool = False) -> Score:
    """Score on the first `max_bytes` of the held-out text."""
    config, corpus = run.config, run.corpus.held_out
    batches = held_out_batches(corpus, config.batch_size, config.sequence_length, max_bytes=max_bytes, pack=config.pack)
    total = count_held_out_batches(corpus, config.batch_size, config.sequence_length, max_bytes)
    bar = partial(progress, total=total, desc="held-out score", unit="batch", leave=False, shown=show)
    num_bytes, budget = scored_span(corpus, max_bytes).num_bytes, float(config.hyper.pi_alpha)
    return evaluate(state.params, config.model, batches, num_bytes, surprise_budget=budget, progress=bar)


def _sample(run: Run, state: TrainState) -> str:
    """The sample text; "" and a warning where the model can write none, so that the summary is written all the same."""
    try:
        return sample_text(run, state, run.config.sample_tokens)
    except ValueError as error:
        LOG.warning("warning: no sample text: %s", error)
        return ""


def sample_text(run: Run, state: TrainState, tokens: int) -> str:
    """The run's prompt and its continuation; the run's seed decides it."""
    config, tokenizer = run.config, run.corpus.train.tokenizer
    prompt = config.prompt or ""
    ids = torch.from_numpy(tokenizer.prompt(prompt).astype("int64"))[None].to(run.device)
    generator = torch.Generator().manual_seed(config.seed)
    out = generate(
        state.params, ids, config.model, generator, max_new_tokens=tokens, context_length=config.sequence_length,
        temperature=0.8, surprise_budget=float(config.hyper.pi_alpha),
    )  # fmt: skip
    return tokenizer.decode(out[0, 0 if prompt else 1 :].tolist())


def draw(run: Run) -> None:
    """Draw both pictures from all records so far."""
    lines = {name: bits * math.log(2) * run.bytes_per_token for name, bits in run.baselines.items()}
    title = f"{run.folder.name}: {run.config.data}"
    draw_core_metrics(run.history, run.folder / "core_metrics_latest.png", title=title, baselines=lines)
    draw_expert_dashboard(
        run.history, run.folder / "expert_dashboard_latest.png", alarms=alarms(run.history, run.config), title=title
    )


def alarms(history: Sequence[Mapping[str, Any]], config: RunConfig) -> list[str]:
    """Collapse alarms of the last records' routing, in sentences."""
    model, hyper = config.model, hyper_params(config)
    return collapse_alarms(
        history, model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
        min_experts_per_tok=model.min_experts_per_tok, max_experts_per_tok=model.max_experts_per_tok,
        guards=Guards(*(float(getattr(hyper, name)) for name in Guards._fields)),
    )  # fmt: skip


def score_table(score: Score, baselines: Mapping[str, float], of: str = "held-out bytes") -> str:
    """Bits per byte of the model among the baselines, best first."""
    return _ranking({"this model": score.bits_per_byte, **baselines}, score.bytes, of)


def summary_table(summary: Mapping[str, Any], folder: str) -> str:
    """Table of a run: score, speed, sizes, a sample, and the place of every file."""
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
    if stopped := summary.get("stopped"):  # not in summaries of former versions
        lines.append(f"{'stopped early':<18} after step {stopped['step']:,}: {stopped['reason']}")
    lines += [f"ALARM: {alarm}" for alarm in summary["alarms"]]
    if summary["sample"]:
        lines += ["", "sample:", summary["sample"]]
    return "\n".join(lines)


def _ranking(bits: Mapping[str, float], num_bytes: int, of: str = "held-out bytes") -> str:
    rows = sorted(bits.items(), key=lambda row: row[1])
    return "\n".join((f"bits per byte on {num_bytes:,} {of}", *(f"  {n:<12} {b:.3f}" for n, b in rows)))
