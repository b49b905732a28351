"""What one step trains on."""

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100  # label of a position that has no target, as in torch.nn.functional.cross_entropy


class Batch(NamedTuple):
    """Tokens, the token that each position must predict, and which tokens are real; all (B, S) int64.

    `labels[b, s]` is already shifted: the target of position s, or -100 where there is none.
    `attention_mask` is 0 on padding and 1 on real tokens; in packed rows the number of the document, 1 or more, that a
    token belongs to. A token attends to earlier tokens of its own number.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
