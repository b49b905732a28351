"""Argument checks of generation and decoding: each error is one line that names the argument."""

import torch
from torch import Tensor

from tiny_onn_func.checks import check_dtype, check_mask, check_shape
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.routing import check_budget


def require(fine: bool, name: str, wanted: str, came: object) -> None:
    """Raise an error unless `fine` is true.

    Raises:
        ValueError: it is not; the message names the argument, what was wanted, and what came.
    """
    if not fine:
        raise ValueError(f"{name}: expected {wanted}, got {came}")


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None, config: ModelConfig) -> None:
    """Check a prompt: (batch, tokens) ids of the vocabulary, at least one, and a mask of the same shape."""
    check_dtype("prompt", input_ids, torch.int64)
    require(input_ids.ndim == 2, "prompt", "(batch, tokens)", f"shape {tuple(input_ids.shape)}")
    require(input_ids.numel() >= 1, "prompt", "at least one token", "none")
    if attention_mask is not None:
        check_shape("attention_mask", attention_mask, input_ids.shape)
    if input_ids.device.type == "meta":
        return
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    require(lowest >= 0, "prompt", "tokens of 0 or more", lowest)
    require(highest < config.vocab_size, "prompt", f"tokens below vocab_size ({config.vocab_size})", highest)


def check_memory(
    batch: int, columns: int, mask: Tensor | None, context_length: int | None, surprise_budget: float
) -> None:
    """Check the cache's sizes, the mask (padding on the left, one document a row) and the budget's range."""
    check_budget(surprise_budget)
    sizes = ("batch", batch), ("columns", columns), ("context_length", 1 if context_length is None else context_length)
    for name, size in sizes:
        require(isinstance(size, int) and size >= 1, name, "a whole number of 1 or more", size)
    if mask is None:
        return
    require(mask.ndim == 2, "attention_mask", "(batch, prompt)", f"shape {tuple(mask.shape)}")
    require(mask.shape[1] <= columns, "attention_mask", f"at most {columns} columns", mask.shape[1])
    check_mask("attention_mask", mask, (batch, mask.shape[1]))
    if mask.device.type == "meta":
        return
    numbers = mask.to(torch.int64)  # of bool a difference is another, and never negative
    rules = (
        ((numbers <= 1).all(), "zeros and ones, one document a row", "other numbers"),
        ((numbers[:, -1:] == 1).all(), "padding on the left only", "some at the end of a row"),
        ((numbers.diff(dim=1) >= 0).all(), "padding on the left only", "some within a row"),
    )
    for fine, wanted, came in rules:
        if mask.device.type == "cpu":
            require(bool(fine), "attention_mask", wanted, came)
        else:
            torch._assert_async(fine, f"attention_mask: expected {wanted}, got {came}")


def check_tokens(tokens: Tensor, start: int, already: int, batch: int, columns: int, prompt: int | None) -> None:
    """Check that tokens follow directly on the cache: a gap would be attended to, a step back erases nothing.

    Args:
        already: columns that were read; a text may begin anew at 0.
        prompt: columns of the mask, all of which are read at once.
    """
    check_dtype("tokens", tokens, torch.int64)
    require(tokens.ndim == 2, "tokens", "(batch, new)", f"shape {tuple(tokens.shape)}")
    require(len(tokens) == batch, "tokens", f"a row for each of {batch} texts", len(tokens))
    new = tokens.shape[1]
    require(start in (0, already), "start", f"{already}, the column behind what was read, or 0", start)
    if start:
        require(new == 1, "tokens", "one of each row behind column 0", new)
    else:
        wanted = "one or more of each row" if prompt is None else f"the mask's {prompt} of each row"
        require(new >= 1 and prompt in (None, new), "tokens", wanted, new)
    require(start + new <= columns, "tokens", f"at most {columns} columns", start + new)
