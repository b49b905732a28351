"""`tiny-onn evaluate`: score a run on held-out text."""

from pathlib import Path

from training.data.baselines import baselines
from training.data.batches import held_out_batches, scored_span
from training.data.corpus import open_corpus
from training.errors import UserError
from training.run.evaluate import Score, evaluate
from training.run.finished import open_run


def evaluate_run(
    folder: str | Path, *, data: str | None = None, max_bytes: int | None = None
) -> tuple[Score, dict[str, float]]:
    """The score of a run on the held-out part of its data or of another source; the baselines on the same bytes."""
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"--bytes: expected 1 or more, got {max_bytes}")
    config, params, tokenizer = open_run(folder)
    corpus = open_corpus(
        data or config.data, holdout=config.holdout, split=config.split, sequence_length=config.sequence_length,
        tokenizer=tokenizer,
    )  # fmt: skip
    batches = held_out_batches(
        corpus.held_out, config.batch_size, config.sequence_length, max_bytes=max_bytes, pack=config.pack
    )
    num_bytes = scored_span(corpus.held_out, max_bytes).num_bytes
    score = evaluate(params, config.model, batches, num_bytes, surprise_budget=config.hyper.pi_alpha)
    return score, baselines(corpus.train, corpus.held_out, max_bytes)
