"""Tables from a token's id to scores of experts: one that balances the experts, one that counts a router's choices."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.hashing import hash_logits
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import as_scalar, as_wide_as
from training.step.hyper_params import HyperParams
from training.step.sums import Sums


def balanced_table(counts: npt.NDArray[np.int64], config: ModelConfig) -> Float[Tensor, "layers vocab experts"]:
    """Scores by token with which K experts a token get even shares of a text with these token counts.

    Layer by layer, the most frequent token first, each takes the K experts with the least rows so far, of equal ones
    those that a hash of (layer, token) ranks first (balanced assignment of Hash Layers: Roller et al. 2021, arXiv
    2106.04426, section 3.2). The chosen have the score 1 + their hash's number, the others that number alone, so that
    weights are those of a hash; float32.

    Args:
        counts: (vocab,) occurrences of each token.

    Raises:
        ValueError: the configuration has no fixed K.
    """
    k = config.num_experts_per_tok
    if k < 1:
        raise ValueError(f"model.num_experts_per_tok: expected a fixed K with hash_key: table, got {k}")
    ids = torch.arange(config.vocab_size)
    table = torch.stack([hash_logits(ids, at, config.num_experts) for at in range(config.num_hidden_layers)])
    order = np.argsort(-counts, kind="stable")
    for scores in table:
        rows, hashed = np.zeros(config.num_experts, np.int64), scores.numpy()
        for token in order:
            chosen = np.lexsort((-hashed[token], rows))[:k]
            rows[chosen] += counts[token]
            hashed[token, chosen] += 1
    return table


def token_visits(
    trace: RouterTrace, token_ids: Int[Tensor, "*runs tokens"], config: ModelConfig
) -> Float[Tensor, "*runs layers vocab experts"]:
    """Visits of this batch's tokens to each expert, by the token's id."""
    experts, vocab = config.num_experts, config.vocab_size
    place = (token_ids[..., None, :, None] * experts + trace.expert_ids).flatten(-2)
    empty = trace.weights.new_zeros((*place.shape[:-1], vocab * experts))
    visits = empty.scatter_add(-1, place, trace.active.to(empty.dtype).flatten(-2))
    return visits.unflatten(-1, (vocab, experts))


def counted(router: Mapping[str, Tensor], sums: Sums, step: Tensor, hyper: HyperParams) -> dict[str, Tensor]:
    """The table with this step's visits added to `table_memory` of its counts, until the step after which it chooses.

    The share of an expert in a token's counts is what a router that sees the token alone and is distilled from the
    choices by cross entropy would learn.
    """
    table, last = router["token_table"], as_scalar(hyper.table_step, step.device)
    is_on = (last > 0) & (step + 1 >= last)
    memory = as_wide_as(table, as_scalar(hyper.table_memory, table.device, table.dtype))
    added = memory * table + sums.token_visits.to(table.dtype)
    was_on = (router["table_on"] > 0).unsqueeze(-1)
    on = as_wide_as(router["table_on"], is_on) | (router["table_on"] > 0)
    return {"token_table": torch.where(was_on, table, added), "table_on": on.to(router["table_on"].dtype)}
