"""One batch of tokens, labels and the attention mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from tiny_onn_func.checks import check_dtype, check_shape
from tiny_onn_func.kernels.step import IGNORE_INDEX as IGNORE_INDEX


class Batch(NamedTuple):
    """Tokens, the token that each position must predict, and which tokens are real; all (B, S) int64.

    `labels[b, s]` is already shifted: the target of position s, or -100 where there is none.
    `attention_mask` is 0 on padding and 1 on real tokens; in packed rows the number of the document, 1 or more, that a
    token belongs to. A token attends to earlier tokens of its own number.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def without_padding_labels(batch: Batch) -> Batch:
    """The batch with -100 as the label of every padded position: padding is excluded from the loss, too.

    Raises:
        ValueError: no batch of tensors, labels that are not int64, or labels or a mask of another shape than the ids.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"batch: expected a Batch, got {type(batch).__name__}; Batch(input_ids, labels, mask) is one")
    for name, part in zip(batch._fields, batch, strict=True):
        if not isinstance(part, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(part).__name__}; make one with torch.tensor")
    check_dtype("labels", batch.labels, torch.int64)  # `where` would widen what is narrower
    check_shape("labels", batch.labels, batch.input_ids.shape)
    check_shape("attention_mask", batch.attention_mask, batch.input_ids.shape)
    return batch._replace(labels=torch.where(batch.attention_mask != 0, batch.labels, IGNORE_INDEX))
