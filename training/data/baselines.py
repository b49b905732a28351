"""Baselines on the held-out text: unigram and bigram models, and three compressors."""

import bz2
import gzip
import lzma
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from training.data.batches import Array, chunks, scored_span
from training.data.corpus import Corpus
from training.data.tokenizer import BOUNDARY, BYTES, VOCAB_SIZE, Tokenizer, Tokens

FEWER = 1 << 18  # tokens that are spelled out at a time


# Baselines ------------------------------------------------------------------------------------------------------------


def baselines(train: Corpus, held_out: Corpus, max_bytes: int | None = None) -> dict[str, float]:
    """Bits per byte of models that need no training, on the bytes that `held_out_batches` with `max_bytes` scores.

    `uniform`: log2(257) a target. `unigram` and `bigram`: counts of the targets of the training side, one added to
    each. `gzip -9`, `bzip2 -9` and `xz -9e`: those bytes in one file; they are told no boundaries, the others pay for
    them. Whatever the tokenizer, their targets are bytes, and special tokens, which they cannot tell apart.
    """
    end, _, num_bytes = scored_span(held_out, max_bytes)
    known, scored = _pairs(train, train.tokens.size), _pairs(held_out, end)
    text = _scored_text(held_out, end)
    bits = {
        "uniform": scored.sum() * np.log2(VOCAB_SIZE),
        "unigram": _cost(known.sum(axis=0), scored.sum(axis=0)),
        "bigram": _cost(known, scored),
        "gzip -9": 8 * len(gzip.compress(text, 9, mtime=0)),
        "bzip2 -9": 8 * len(bz2.compress(text, 9)),
        "xz -9e": 8 * len(_xz(text)),
    }
    return {name: float(value / num_bytes) for name, value in bits.items()}


def _xz(text: bytes) -> bytes:
    """The text by `xz -9e`, whose dictionary of 64 MiB has no use for more memory than there is text."""
    preset, dictionary = 9 | lzma.PRESET_EXTREME, min(max(len(text), 4096), 1 << 26)
    return lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}])


def _pairs(corpus: Corpus, end: int) -> Array:
    """counts[a, b] of targets b behind a byte a, among tokens[:end]."""
    counts = np.zeros(VOCAB_SIZE**2, np.int64)
    for before, symbols, is_target in _symbols(corpus, end):
        counts += np.bincount((before.astype(np.int64) * VOCAB_SIZE + symbols)[is_target], minlength=VOCAB_SIZE**2)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE)


def _cost(known: Array, scored: Array) -> float:
    """-sum scored log2 p, with p = (known + 1) / sum (known + 1) over the last axis."""
    smooth = known + 1.0
    return float(-(scored * np.log2(smooth / smooth.sum(axis=-1, keepdims=True))).sum())


def _scored_text(corpus: Corpus, end: int) -> bytes:
    kept = (symbols[is_target & (symbols != BOUNDARY)] for _, symbols, is_target in _symbols(corpus, end))
    return b"".join(part.astype(np.uint8).tobytes() for part in kept)


def _symbols(corpus: Corpus, end: int) -> Iterator[tuple[Tokens, Tokens, npt.NDArray[np.bool_]]]:
    """(the byte before, bytes, whether they are scored) over the bytes of tokens[1:end]; 256 is any special token."""
    if corpus.tokenizer is BYTES:
        for start, tokens, is_target in chunks(corpus, end):
            yield corpus.tokens[start - 1 : start - 1 + tokens.size], tokens, is_target
        return
    table, begins, counts = _spelling(corpus.tokenizer)
    for start, _, flags in chunks(corpus, end):
        for first in range(0, flags.size, FEWER):  # a token may be many bytes
            is_target = flags[first : first + FEWER]
            tokens = corpus.tokens[start + first - 1 : start + first + is_target.size]
            sizes = counts[tokens]
            shift = np.repeat(begins[tokens] - (np.cumsum(sizes) - sizes), sizes)
            spelled = table[shift + np.arange(shift.size)]
            yield spelled[sizes[0] - 1 : -1], spelled[sizes[0] :], np.repeat(is_target, sizes[1:])


def _spelling(tokenizer: Tokenizer) -> tuple[npt.NDArray[np.uint16], Array, Array]:
    """(the bytes of all tokens one after the other, where each begins, how many it has); 256 for special ones."""
    counts = np.maximum(tokenizer.lengths, 1).astype(np.int64)
    special = tokenizer.lengths == 0
    written = b"".join(b"\0" if bare else piece for bare, piece in zip(special, tokenizer.pieces, strict=True))
    table = np.frombuffer(written, np.uint8).astype(np.uint16)
    begins = np.cumsum(counts) - counts
    table[begins[special]] = BOUNDARY
    return table, begins, counts
