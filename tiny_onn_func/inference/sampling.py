"""Logits -> the next token: repetition penalty, temperature, top-k, top-p."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


def penalize(
    logits: Float[Tensor, "batch vocab"], seen: Bool[Tensor, "batch vocab"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Make the tokens that the text has already less likely: a positive logit / penalty, a negative one * penalty.

    As CTRL does (arXiv 1909.05858), and `transformers`; it comes first, before the temperature.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
