"""Sampling text from a model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward


def generate(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "batch prompt"],
    config: ModelConfig,
    generator: Generator,
    *,
    max_new_tokens: int,
    context_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    surprise_budget: float = 0.5,
) -> Int[Tensor, "batch total"]:
    """The prompt and `max_new_tokens` sampled tokens; the same generator state gives the same tokens.

    Args:
        context_length: how many of the last tokens the model sees; use the length it was trained with.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probability reaches p.
    """
    sampled = stream(
        params, input_ids, config, generator, max_new_tokens=max_new_tokens, context_length=context_length,
        temperature=temperature, top_k=top_k, top_p=top_p, surprise_budget=surprise_budget,
    )  # fmt: skip
    return torch.cat((input_ids, *(token[:, None] for token in sampled)), dim=1)


def stream(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "batch prompt"],
    config: ModelConfig,
    generator: Generator,
    *,
    max_new_tokens: int,
    context_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    surprise_budget: float = 0.5,
) -> Iterator[Int[Tensor, " batch"]]:
    """The sampled tokens of `generate`, one position at a time.

    Raises:
        ValueError: an empty prompt, or an argument out of range.
    """
    _check(input_ids, config, max_new_tokens, context_length, temperature, top_k, top_p)
    tokens = input_ids
    for _ in range(max_new_tokens):
        with torch.no_grad():
            window = tokens[:, -context_length:]
            logits, _ = forward(params, window, config, surprise_budget=surprise_budget)
        token = sample(logits[:, -1], generator, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens = torch.cat((tokens, token[:, None]), dim=1)
        yield token


def sample(
    logits: Float[Tensor, "batch vocab"],
    generator: Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Tensor, " batch"]:
    """One token a row: temperature first, then top-k, then top-p (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # so that a temperature near zero overflows nothing
    ranked, ids = (below_best / max(temperature, 1e-30)).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked, ids = ranked[:, :top_k], ids[:, :top_k]
    p = ranked.softmax(dim=-1)
    mass_before = p.cumsum(dim=-1) - p
    p = torch.where((mass_before < top_p) | (mass_before == 0), p, 0.0)
    picked = torch.multinomial(p, 1, generator=generator)
    return ids.gather(-1, picked).squeeze(-1)


def _check(
    input_ids: Tensor, config: ModelConfig, new: int, context: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    lowest, highest = (int(input_ids.min()), int(input_ids.max())) if input_ids.numel() else (0, 0)
    checks = (
        (input_ids.shape[1] >= 1, "prompt", "at least one token", "none"),
        (lowest >= 0, "prompt", "tokens of 0 or more", lowest),
        (highest < config.vocab_size, "prompt", f"tokens below vocab_size ({config.vocab_size})", highest),
        (new >= 0, "max_new_tokens", "0 or more", new),
        (context >= 1, "context_length", "1 or more", context),
        (temperature >= 0, "temperature", "0 or more", temperature),
        (top_k is None or top_k >= 1, "top_k", "1 or more", top_k),
        (0 < top_p <= 1, "top_p", "a number in (0, 1]", top_p),
    )
    for fine, name, wanted, came in checks:
        if not fine:
            raise ValueError(f"{name}: expected {wanted}, got {came}")
