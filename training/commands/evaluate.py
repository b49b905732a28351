"""`tiny-onn evaluate`: score a run on held-out text, or on all of a text."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from tiny_onn_func.tree import to_device
from training.data.baselines import baselines
from training.data.batches import count_held_out_batches, held_out_batches, scored_span
from training.data.corpus import Splits, TooLittleText, open_corpus, whole
from training.errors import UserError
from training.run.config import RunConfig
from training.run.device import choose_device
from training.run.evaluate import Score, evaluate
from training.run.finished import FinishedRun, open_run
from training.terminal import LOG, progress

IN_TRAINING = (
    "note: parted otherwise than in training, the run's own text may be one that it was trained on: no held-out score"
)


class Evaluation(NamedTuple):
    """A score, and what it is of."""

    score: Score
    baselines: dict[str, float]  # bits per byte on the same bytes; none where all of the text is scored
    data: str
    split: str  # document or tail; all
    held_out: bool  # False where the run may have been trained on it


def evaluate_run(
    folder: str | Path,
    *,
    data: str | None = None,
    max_bytes: int | None = None,
    split: str | None = None,
    holdout: float | None = None,
    everything: bool = False,
    device: str = "auto",
) -> Evaluation:
    """Score a run on the held-out part of its data or of another source, beside baselines on the same bytes.

    Args:
        split, holdout: how the text is parted; as in the run by default. Of the run's own data another part may be one
            that it was trained on.
        everything: score all of the text, held out or not.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: no run, a text that cannot be read, or that has too little on a side.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"--bytes: expected 1 or more, got {max_bytes}; leave it away for all of them")
    if everything and not (split is None and holdout is None):
        raise UserError("--all: expected no --split and no --holdout with it, which part a text; leave them away")
    if holdout is not None and not 0 < holdout < 1:
        raise UserError(f"--holdout: expected more than 0 and less than 1, got {holdout!r}")
    place, _ = choose_device(device, key="--device")
    run = open_run(folder)
    config, source = run.config, data or run.config.data
    splits = _open(run, source, split, holdout, everything)
    held_out = not everything and (source != config.data or is_held_out(config, split, holdout))
    if not held_out and not everything:
        LOG.warning(IN_TRAINING)
    corpus = whole(splits) if everything else splits.held_out
    batches = held_out_batches(corpus, config.batch_size, config.sequence_length, max_bytes=max_bytes, pack=config.pack)
    num_bytes = scored_span(corpus, max_bytes).num_bytes
    params = to_device(run.params, place)
    total = count_held_out_batches(corpus, config.batch_size, config.sequence_length, max_bytes)
    bar = partial(progress, total=total, desc="held-out score", unit="batch", leave=False)
    budget = float(config.hyper.pi_alpha)
    score = evaluate(params, config.model, batches, num_bytes, surprise_budget=budget, progress=bar)
    lines = {} if everything else baselines(splits.train, splits.held_out, max_bytes)
    return Evaluation(score, lines, source, "all" if everything else splits.split, held_out)


def is_held_out(config: RunConfig, split: str | None, holdout: float | None) -> bool:
    """True if the run's own data is parted as in training; None stands for what the run had."""
    return split in (None, config.split) and holdout in (None, config.holdout)


def _open(run: FinishedRun, source: str, split: str | None, holdout: float | None, everything: bool) -> Splits:
    """The text in two sides; for all of it any two will do."""
    config = run.config
    try:
        if everything:
            return open_corpus(source, sequence_length=1, holdout=0.5, split="tail", tokenizer=run.tokenizer)
        return open_corpus(
            source, sequence_length=config.sequence_length, holdout=config.holdout if holdout is None else holdout,
            split=split or config.split, tokenizer=run.tokenizer,
        )  # fmt: skip
    except TooLittleText as error:
        text = str(error).rpartition("; ")[0]
        raise UserError(f"{text}; {_mend(error, everything)}") from None


def _mend(error: TooLittleText, everything: bool) -> str:
    """Flags with which the text has enough on both sides, or the score that needs no sides."""
    if everything:
        return "give more text"
    flags = (
        "" if error.holdout is None else f"--split tail --holdout {error.holdout:g} has enough on each side, or use "
    )
    return f"{flags}--all, which scores all of it"
