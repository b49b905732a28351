"""From text to batches: sources, documents, tokens, the split, and the baselines on the held-out text."""

from training.data.baselines import baselines
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import open_corpus

__all__ = ["baselines", "batch_at", "held_out_batches", "open_corpus", "scored_span"]
