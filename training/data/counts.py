"""Counts of tokens in a text."""

import numpy as np
import numpy.typing as npt

from training.data.corpus import Corpus
from training.data.streams import CHUNK


def token_counts(text: Corpus, vocab_size: int) -> npt.NDArray[np.int64]:
    """Occurrences of each token id, (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, text.tokens.size, CHUNK):
        counts += np.bincount(text.tokens[start : start + CHUNK], minlength=vocab_size)
    return counts
