"""Logits -> the next token: repetition penalty, temperature, top-k, top-p."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

MOST_PENALTY = 1e9  # and its inverse the least: farther from 1 a penalized logit would overflow


class SamplingParams(NamedTuple):
    """Parameters by which the next token is drawn.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only; None: among all.
        top_p: sample among the fewest tokens whose probability reaches p.
        repetition_penalty: divides positive logits, multiplies negative ones, of every token of prompt and text; from
            1e-9 to 1e9.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Refuse a number out of range.

        Raises:
            ValueError: the message names it.
        """
        penalty, most = self.repetition_penalty, MOST_PENALTY
        rules = (
            (self.temperature >= 0, "temperature", "0 or more", self.temperature),
            (self.top_k is None or self.top_k >= 1, "top_k", "1 or more", self.top_k),
            (0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p),
            (1 / most <= penalty <= most, "repetition_penalty", f"a number from {1 / most:g} to {most:g}", penalty),
        )
        for fits, name, wanted, came in rules:
            if not fits:
                raise ValueError(f"{name}: expected {wanted}, got {came}")


def penalize(
    logits: Float[Tensor, "batch vocab"], present: Bool[Tensor, "batch vocab"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Make tokens that the text has already less likely: a positive logit / penalty, a negative one * penalty.

    As CTRL does (arXiv 1909.05858), and `transformers`; it comes first, before the temperature.
    """
    if penalty == 1:
        return logits
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Float[Tensor, "batch vocab"], generator: Generator, params: SamplingParams) -> Int[Tensor, " batch"]:
    """One token a row: temperature first, then top-k, then top-p (nucleus sampling, arXiv 1904.09751).

    Raises:
        ValueError: a logit is NaN or infinite, which no token follows from.
    """
    check_finite(logits)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # so that a temperature near zero overflows nothing
    ranked, ids = (below_best / max(params.temperature, 1e-30)).sort(dim=-1, descending=True, stable=True)
    if params.top_k is not None:
        ranked, ids = ranked[:, : params.top_k], ids[:, : params.top_k]
    p = ranked.softmax(dim=-1)
    mass_before = p.cumsum(dim=-1) - p
    p = torch.where((mass_before < params.top_p) | (mass_before == 0), p, 0.0)
    picked = torch.multinomial(p.to(generator.device), 1, generator=generator).to(ids.device)
    return ids.gather(-1, picked).squeeze(-1)


def check_finite(logits: Float[Tensor, "batch vocab"]) -> None:
    """Refuse logits with NaN or infinity among them; on the meta device there are no values to look at.

    Raises:
        ValueError: there is one.
    """
    if logits.device.type == "meta":
        return
    broken = logits[~logits.isfinite()]
    if broken.numel():
        raise ValueError(
            f"logits: expected finite numbers, got {float(broken[0])}; the parameters are not finite or too large, "
            "write with those of an earlier checkpoint"
        )
