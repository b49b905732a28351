"""A 32-bit hash in tensor arithmetic: pseudo-random numbers that map, repeat and need no generator."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.config import HashKey

NO_TOKEN = -1  # id of a place before the first token of a document
WORD = 1 << 32
_MASK = WORD - 1


def mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants) in int64 arithmetic: each output bit depends on every input bit."""
    x = x.to(torch.int64) & _MASK  # products of narrower integers would overflow
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def hash_keys(
    token_ids: Int[Tensor, "*runs batch seq"], documents: Int[Tensor, "*runs batch seq"] | None, kind: HashKey
) -> Int[Tensor, "*runs batch seq"]:
    """The key of each token that a hash router hashes, int64.

    `token` and `table` take the id; `previous` the id before it, -1 at the start of a document; `pair` a mixture of
    both; `position` the number of tokens before it in its document.

    Args:
        documents: 0 on padding, 1, 2, ... on tokens of a row's documents (an attention mask); None: one document.
    """
    if kind in ("token", "table"):
        return token_ids
    documents = torch.ones_like(token_ids) if documents is None else documents
    previous = earlier_ids(token_ids, documents, 1)
    place = torch.arange(token_ids.shape[-1], device=token_ids.device).expand_as(token_ids)
    if kind == "position":
        place = place - torch.where(previous == NO_TOKEN, place, 0).cummax(dim=-1).values
    return key_of(kind, token_ids, previous, place)


def earlier_ids(
    token_ids: Int[Tensor, "*runs batch seq"],
    documents: Int[Tensor, "*runs batch seq"] | Bool[Tensor, "*runs batch seq"],
    back: int,
) -> Int[Tensor, "*runs batch seq"]:
    """Id of the token that many places before each one; NO_TOKEN where that is of another document, or none."""
    numbers = documents.to(torch.int64)
    is_same = _shifted(numbers, back, -1) == numbers
    return torch.where(is_same, _shifted(token_ids, back, NO_TOKEN), NO_TOKEN)


def _shifted(t: Int[Tensor, "*batch seq"], back: int, fill: int) -> Int[Tensor, "*batch seq"]:
    """Entry i is entry i - back."""
    return F.pad(t, (back, 0), value=fill)[..., : t.shape[-1]]


def key_of(kind: HashKey, token: Tensor, previous: Tensor, position: Tensor) -> Tensor:
    """The key of tokens whose predecessors' ids and positions are known."""
    keys = {"token": lambda: token, "table": lambda: token, "previous": lambda: previous, "position": lambda: position}
    return keys.get(kind, lambda: mix(previous) + token)()


def hash_logits(
    keys: Int[Tensor, "*runs tokens"], layer: int, num_experts: int
) -> Float[Tensor, "*runs tokens experts"]:
    """A number in [0, 1) for each (layer, key, expert), float32.

    A router with these logits, the keys being token ids, is a hash of the token (Roller et al. 2021, arXiv 2106.04426):
    it learns nothing, and sends a token to the same experts wherever it stands.
    """
    key = mix(mix(keys) + layer + 1)
    words = mix(key.unsqueeze(-1) + mix(torch.arange(num_experts, device=keys.device)))
    return words.to(torch.float32) / WORD  # rounded once: WORD is a power of two
