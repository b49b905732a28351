"""Tokens -> batches: windows to train on, a pure function of (seed, step), and windows that score each token once.

    splits = open_corpus("stdlib", sequence_length=64)
    batch = batch_at(splits.train, seed=0, step=7, batch_size=12, sequence_length=64)
    bits_per_byte = nats / ln 2 / scored_span(splits.held_out, max_bytes).num_bytes

where nats is the summed loss over the labels of `held_out_batches(splits.held_out, ..., max_bytes)`. The bytes are
those of the text that the labels stand for, so the number means the same for every tokenizer.

With `pack`, what is in a row keeps to itself: `attention_mask` numbers the documents (1, 2, ...; 0 is padding), and a
token attends to its own only. A boundary closes a document as a label and opens the next one as an input.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from training.data.corpus import Corpus
from training.data.mixture import draw_parts
from training.data.streams import CHUNK
from training.data.tokenizer import Tokens
from training.errors import UserError
from training.step.batch import IGNORE_INDEX, Batch

REDRAWS = 1000  # of windows without a target, before the targets are listed, which takes a pass over the text
Array = npt.NDArray[np.int64]


def batch_at(corpus: Corpus, seed: int, step: int, batch_size: int, sequence_length: int, pack: bool = False) -> Batch:
    """Batch of a step: a pure function of (seed, step), whatever the earlier calls.

    Rows are windows of sequence_length + 1 tokens from anywhere in the stream, so they may cross boundaries; with
    `pack`, attention does not. Each has at least one target; a window that has none is drawn again.

    Args:
        seed: 0 to 2**128 - 1.
        step: 0 to 2**128 - 1.

    Raises:
        UserError: the corpus is too short for one window, or has no target.
    """
    if corpus.tokens.size <= sequence_length or not corpus.num_targets:
        raise UserError(
            f"sequence_length: expected a text of at least {sequence_length + 1} tokens (sequence_length + 1) with a "
            f"target, got {corpus.tokens.size} tokens and {corpus.num_targets} targets; make it smaller"
        )
    stream = np.random.Philox(key=int(seed), counter=int(step) << 64)
    if corpus.parts:
        starts = _draw_mixed(corpus, stream, batch_size, sequence_length)
    else:
        starts = _draw_starts(corpus.targets, stream, batch_size, sequence_length)
    index = starts[:, None] + np.arange(sequence_length + 1)
    window = corpus.tokens[index].astype(np.int64)
    labels = np.where(corpus.targets[index[:, 1:]] != 0, window[:, 1:], IGNORE_INDEX)
    return _batch(window[:, :-1], labels, _mask(window[:, :-1], np.ones_like(labels), corpus, pack))


def _draw_mixed(corpus: Corpus, stream: np.random.Philox, rows: int, length: int) -> Array:
    """(rows,) places, each in a part that is drawn by its weight."""
    chosen = draw_parts([part.weight for part in corpus.parts], stream.random_raw(rows))
    starts = np.empty(rows, np.int64)
    for index, (begin, end, _) in enumerate(corpus.parts):
        at = np.flatnonzero(chosen == index)
        if at.size:
            starts[at] = begin + _draw_starts(corpus.targets[begin:end], stream, at.size, length)
    return starts


def _draw_starts(flags: npt.NDArray[np.uint8], stream: np.random.Philox, rows: int, length: int) -> Array:
    """(rows,) places where windows with a target begin; all such windows are equally likely, unless hardly any has one.

    Counter-based: the raw outputs of Philox with key `seed`, the same in all versions of numpy; each step has 2**64
    counters of its own.
    """
    count = flags.size - length
    starts = (stream.random_raw(rows) % np.uint64(count)).astype(np.int64)
    labelled = np.arange(1, length + 1)
    for _ in range(REDRAWS):
        bare = np.flatnonzero(~flags[starts[:, None] + labelled].any(axis=1))
        if not bare.size:
            return starts
        starts[bare] = (stream.random_raw(bare.size) % np.uint64(count)).astype(np.int64)
    targets = np.flatnonzero(flags[1:]) + 1
    chosen = targets[stream.random_raw(bare.size) % np.uint64(targets.size)]
    before = (stream.random_raw(bare.size) % np.uint64(length)).astype(np.int64) + 1
    starts[bare] = np.clip(chosen - before, 0, count - 1)
    return starts


def _mask(ids: Array, real: Array, corpus: Corpus, pack: bool) -> Array:
    """1 on real tokens and 0 on padding; with `pack` the number of the token's document in its row."""
    return real * (1 + np.cumsum(ids == corpus.tokenizer.boundary, axis=1)) if pack else real


def _batch(input_ids: Array, labels: Array, attention_mask: Array) -> Batch:
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (input_ids, labels, attention_mask)))


# Scoring --------------------------------------------------------------------------------------------------------------


class ScoredSpan(NamedTuple):
    """Scored part of a stream: the targets among tokens[1:end], and the bytes of text that they stand for."""

    end: int
    num_targets: int
    num_bytes: int


def scored_span(corpus: Corpus, max_bytes: int | None = None) -> ScoredSpan:
    """The shortest beginning of a stream with at least `max_bytes` bytes to score, or all of it.

    The first token has nothing before it and is not scored. Boundaries are scored like any target, so their cost is
    charged to the text, but they are no bytes; nor are other special tokens.

    Raises:
        UserError: `max_bytes` is less than 1, or there is nothing to score.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes: expected 1 or more, or none for all, got {max_bytes!r}")
    num_targets = num_bytes = 0
    for start, tokens, is_target in chunks(corpus, corpus.tokens.size):
        so_far = num_bytes + np.where(is_target, corpus.tokenizer.lengths[tokens], 0).cumsum(dtype=np.int64)
        if max_bytes is not None and so_far[-1] >= max_bytes:
            stop = int(np.searchsorted(so_far, max_bytes)) + 1
            num_targets += int(np.count_nonzero(is_target[:stop]))
            return ScoredSpan(start + stop, num_targets, int(so_far[stop - 1]))
        num_targets += int(np.count_nonzero(is_target))
        num_bytes = int(so_far[-1])
    if not num_bytes:
        raise UserError(f"held-out text: expected a byte to score, got none in {corpus.tokens.size} tokens; give more")
    return ScoredSpan(corpus.tokens.size, num_targets, num_bytes)


def chunks(corpus: Corpus, end: int) -> Iterator[tuple[int, Tokens, npt.NDArray[np.bool_]]]:
    """(start, tokens, True where scored) over tokens[1:end], a few at a time."""
    for start in range(1, end, CHUNK):
        part = slice(start, min(start + CHUNK, end))
        yield start, corpus.tokens[part], corpus.targets[part] != 0


def held_out_batches(
    corpus: Corpus,
    batch_size: int,
    sequence_length: int,
    max_bytes: int | None = None,
    stride: int | None = None,
    pack: bool = False,
) -> Iterator[Batch]:
    """Batches whose labels are the targets of `scored_span(corpus, max_bytes)`, each exactly once.

    Windows begin every `stride` tokens (default: half a window); what an earlier window scored has label -100, so that
    all labels but those of the first window have at least sequence_length - stride tokens of context. Windows with
    nothing to score are left out. All batches have the same shape: behind the end of the stream, and in rows of the
    last batch that are not needed, there is padding (token 0, mask 0). With `pack`, context ends at a boundary.
    """
    stride = max(1, sequence_length // 2) if stride is None else stride
    if not 1 <= stride <= sequence_length:
        raise UserError(f"stride: expected 1 to sequence_length ({sequence_length}), got {stride!r}")
    end = scored_span(corpus, max_bytes).end
    fresh, kept = _scored_windows(corpus, sequence_length, end, stride)
    for begin in range(0, kept.size, batch_size):
        windows = kept[begin : begin + batch_size]
        spare = (0, batch_size - windows.size)
        starts = np.pad(windows * stride, spare, constant_values=end)
        index = starts[:, None] + np.arange(sequence_length)
        real = index < end - 1  # the last token has no successor here
        ids = np.where(real, corpus.tokens[np.where(real, index, 0)], 0).astype(np.int64)
        following = np.where(real, index + 1, 0)
        scored = real & (corpus.targets[following] != 0) & (following >= np.pad(fresh[windows], spare)[:, None])
        labels = np.where(scored, corpus.tokens[following].astype(np.int64), IGNORE_INDEX)
        yield _batch(ids, labels, _mask(ids, real.astype(np.int64), corpus, pack))


def count_held_out_batches(corpus: Corpus, batch_size: int, sequence_length: int, max_bytes: int | None = None) -> int:
    """Number of batches that `held_out_batches` yields."""
    end = scored_span(corpus, max_bytes).end
    return -(-_scored_windows(corpus, sequence_length, end, max(1, sequence_length // 2))[1].size // batch_size)


def _scored_windows(
    corpus: Corpus, sequence_length: int, end: int, stride: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(first target that each window is the first to see, windows with something to score).

    Window w begins at w * stride and is the first to see the targets from fresh[w] to fresh[w + 1].
    """
    fresh = np.r_[1, np.arange(sequence_length + 1, end, stride)]
    return fresh, np.flatnonzero(np.maximum.reduceat(corpus.targets[:end], fresh))
