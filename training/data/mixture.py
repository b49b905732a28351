"""Mixtures of sources, `a.txt:0.7,b.jsonl:0.3`: parts of one stream, and the part from which each row is drawn.

A row of a batch comes from a source with the probability of its weight, divided by the sum of all. The training side
of a mixture is the sources' streams one after the other, whose windows never reach from one into the next. On the
held-out side blocks of them take turns, so that in every beginning of it their shares are about those of the weights.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.readers import printable
from training.data.streams import CHUNK
from training.errors import UserError

BLOCK = 4096  # tokens of a held-out source before another one's turn; then its document goes on to at most twice that

COMMAS = 15  # at most that many in a file's name
SHOWN = 200  # characters of a mixture in an error


class Weighted(NamedTuple):
    """A source and its weight."""

    source: str
    weight: float


class Part(NamedTuple):
    """Tokens `start` to `stop` of the training side, those of one source."""

    start: int
    stop: int
    weight: float


class Stream(NamedTuple):
    """Tokens of a source, and 1 where they are learned."""

    tokens: npt.NDArray[Any]
    targets: npt.NDArray[np.uint8]


def parse_mixture(spec: str) -> tuple[Weighted, ...]:
    """Sources of a `--data` spec with their weights; a single source has weight 1. Weight 0 leaves a source out.

    A comma parts sources, unless a file of that name exists; of a source's colons the last one opens its weight.

    Raises:
        UserError: a source without a weight, a weight that is negative or no finite number, a sum of 0, a source twice.
    """
    if "," not in spec or _exists(spec):
        return (Weighted(spec, 1.0),)
    name, pieces, found = printable(spec if len(spec) <= SHOWN else f"{spec[:SHOWN]}..."), spec.split(","), []
    while pieces:
        longest = min(len(pieces), COMMAS + 1)
        taken = next((n for n in range(longest, 1, -1) if _is_file_with_commas(pieces[:n])), 1)
        found.append(_weighted(",".join(pieces[:taken]), name))
        pieces = pieces[taken:]
    if len({source for source, _ in found}) < len(found):
        raise UserError(f"{name}: expected each source once, got one twice; add up its weights")
    if not 0 < sum(weight for _, weight in found) < math.inf:
        raise UserError(f"{name}: expected weights with a finite sum above 0; such as a.txt:0.7,b.jsonl:0.3")
    return tuple(part for part in found if part.weight)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(os.path.expanduser(name)).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _is_file_with_commas(pieces: Sequence[str]) -> bool:
    """True if the pieces are such a file and its weight."""
    return ":" in pieces[-1] and _exists(",".join(pieces).rpartition(":")[0])


def _weighted(piece: str, name: str) -> Weighted:
    source, _, text = piece.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not source or not 0 <= weight < math.inf:
        raise UserError(
            f"{name}: expected SOURCE:WEIGHT with a weight of 0 or more, got {printable(piece)!r}; "
            "such as a.txt:0.7,b.jsonl:0.3"
        )
    return Weighted(source, weight)


def draw_parts(weights: Sequence[float], words: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Index of a part for each random word, with the probabilities weight / sum; the same on every machine."""
    shares = [Fraction(weight) for weight in weights]
    ends = [sum(shares[: index + 1], Fraction()) / sum(shares) for index in range(len(shares) - 1)]
    return np.searchsorted(np.array([int(end * 2**64) for end in ends], np.uint64), words, side="right")


def taking_turns(streams: Sequence[Stream], weights: Sequence[float], boundary: int) -> Iterator[Stream]:
    """Blocks of all streams, each next one of the stream that is most behind its weight, to the end of all.

    A block that ends within a document is closed by a boundary that is not learned.
    """
    places = [0] * len(streams)
    while left := [i for i, stream in enumerate(streams) if places[i] < stream.tokens.size]:
        index = min(left, key=lambda i: places[i] / weights[i])
        tokens, targets = streams[index]
        begin, places[index] = places[index], _block_end(tokens, places[index], boundary)
        block = slice(begin, places[index])
        yield Stream(tokens[block], targets[block])
        if tokens[places[index] - 1] != boundary:
            yield Stream(np.array([boundary], tokens.dtype), np.zeros(1, np.uint8))


def _block_end(tokens: npt.NDArray[Any], begin: int, boundary: int) -> int:
    soonest, latest = begin + BLOCK, min(begin + 2 * BLOCK, tokens.size)
    ends = np.flatnonzero(tokens[soonest - 1 : latest] == boundary)
    return soonest + int(ends[0]) if ends.size else latest


def write_side(folder: Path, side: str, streams: Iterable[Stream]) -> None:
    """Write the streams of a side one after the other, a part of each in memory."""
    with (folder / f"{side}.tokens").open("wb") as tokens_file, (folder / f"{side}.targets").open("wb") as targets_file:
        for tokens, targets in streams:
            for start in range(0, tokens.size, CHUNK):
                tokens_file.write(tokens[start : start + CHUNK].tobytes())
                targets_file.write(targets[start : start + CHUNK].tobytes())
