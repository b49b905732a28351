"""A run, read back from its folder, and what one does with it: score it, let it write."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tiny_onn_func.generate import stream
from tiny_onn_func.tree import Tree
from training.checkpoint import checkpoint_tokenizer, load_params
from training.data import baselines, held_out_batches, open_corpus, scored_span
from training.errors import UserError
from training.evaluate import Score, evaluate
from training.run_config import RunConfig
from training.settings import load_settings
from training.tokenizer import BYTES, Tokenizer, kept_tokenizer


class FinishedRun(NamedTuple):
    """What a run folder holds for those who use its model."""

    config: RunConfig
    params: Tree
    tokenizer: Tokenizer


def open_run(folder: str | Path) -> FinishedRun:
    """The settings and the newest parameters of a run folder.

    Raises:
        UserError: there is no run in the folder, or no checkpoint in it, or another tokenizer than it trained with.
    """
    settings = Path(folder, "config.yaml")
    if not settings.is_file():
        raise UserError(f"{folder}: expected a run folder with a config.yaml, found none; `tiny-onn train` makes one")
    config = load_settings(str(settings))
    params, model = load_params(folder)
    if model != config.model:
        raise UserError(f"{settings}: expected the sizes of the checkpoint, got others; restore the file as it was")
    tokenizer = kept_tokenizer(folder, config.tokenizer, checkpoint_tokenizer(folder))
    return FinishedRun(config, params, tokenizer)


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


def stream_run(
    folder: str | Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The prompt and then what the model adds to it, piece by piece; the same seed gives the same text."""
    config, params, tokenizer = open_run(folder)
    ids = torch.from_numpy(tokenizer.encode_prompt(prompt).astype("int64"))[None]
    generator = torch.Generator().manual_seed(seed)
    sampled = stream(
        params, ids, config.model, generator, max_new_tokens=tokens, context_length=config.sequence_length,
        temperature=temperature, top_k=top_k, top_p=top_p, surprise_budget=config.hyper.pi_alpha,
    )  # fmt: skip
    yield prompt
    yield from decode_stream((int(token) for token in sampled), tokenizer)


def decode_stream(tokens: Iterable[int], tokenizer: Tokenizer = BYTES) -> Iterator[str]:
    """Tokens as they come -> text as soon as its characters are whole; together what `decode` makes of them all."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.spelled(token))
    yield decoder.decode(b"", final=True)
