"""Generate text: read the prompt at once, then decode token by token with a key-value cache."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.inference.arguments import check_prompt, require
from tiny_onn_func.inference.decode import decode, start_decoding
from tiny_onn_func.inference.sampling import SamplingParams, penalize, sample
from tiny_onn_func.routing import Routing

Watch = Callable[[Int[Tensor, "batch new"], tuple[Routing, ...]], None]  # tokens that were read, their routes a layer


def generate(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "batch prompt"],
    config: ModelConfig,
    generator: Generator,
    *,
    max_new_tokens: int,
    context_length: int | None = None,
    attention_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (),
    pad_token: int | None = None,
    surprise_budget: float = 0.5,
) -> Int[Tensor, "batch total"]:
    """The prompt and up to `max_new_tokens` sampled tokens; the same generator state gives the same tokens.

    Args:
        context_length: how many of the last tokens attention sees, the token itself among them; None: all of them.
        attention_mask: int64 or bool, 1 = real token, 0 = padding, on the left only; None = all real. Positions begin
            at the first real token, and each row becomes what it would be alone.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probability reaches p.
        repetition_penalty: divides positive logits, multiplies negative ones, of every token of prompt and text.
        stop_tokens: a row that writes one of them is finished; the text ends when every row is.
        pad_token: what a finished row is filled with; by default the first stop token.
        surprise_budget: in (0, 1]; read by dynamic K only.

    Raises:
        ValueError: an empty prompt, padding that is not on the left, an argument out of range, or logits that are not
            finite.
    """
    sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty)
    sampled = stream(
        params, input_ids, config, generator, max_new_tokens=max_new_tokens, sampling=sampling,
        context_length=context_length, attention_mask=attention_mask, stop_tokens=stop_tokens, pad_token=pad_token,
        surprise_budget=surprise_budget,
    )  # fmt: skip
    return torch.cat((input_ids, *(token[:, None] for token in sampled)), dim=1)


def stream(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "batch prompt"],
    config: ModelConfig,
    generator: Generator,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008  a frozen value
    context_length: int | None = None,
    attention_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"] | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int | None = None,
    surprise_budget: float = 0.5,
    watch: Watch | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """The sampled tokens of `generate`, one position at a time.

    Args:
        watch: receives the tokens that were read and the experts that each layer sent them to: the prompt first, then
            every sampled token but the last, which is not read.
    """
    stop_tokens = tuple(stop_tokens)  # an iterator is read once
    pad = next(iter(stop_tokens), 0) if pad_token is None else pad_token
    check_prompt(input_ids, attention_mask, config)
    sampling.check()
    require(max_new_tokens >= 0, "max_new_tokens", "0 or more", max_new_tokens)
    for name, ids in (("stop_tokens", stop_tokens), ("pad_token", (pad,))):
        for index in ids:
            require(0 <= index < config.vocab_size, name, f"tokens from 0 to {config.vocab_size - 1}", index)
    batch, start = input_ids.shape[0], 0
    state = start_decoding(
        params, config, batch, input_ids.shape[1] + max_new_tokens, attention_mask=attention_mask,
        context_length=context_length, surprise_budget=surprise_budget,
    )  # fmt: skip
    present = _tokens_present(input_ids, attention_mask, config.vocab_size)
    stops = torch.tensor(stop_tokens, device=input_ids.device)
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids
    for _ in range(max_new_tokens):
        logits, routes = decode(state, tokens, start)
        if watch is not None:
            watch(tokens, routes)
        start += tokens.shape[1]
        logits = penalize(logits.clone(), present, sampling.repetition_penalty)  # a clone leaves inference mode
        token = sample(logits, generator, sampling)
        if stop_tokens:
            token = torch.where(running, token, pad)
            running = running & ~torch.isin(token, stops)
        present = present if sampling.repetition_penalty == 1 else present.scatter(1, token[:, None], True)
        yield token
        if stop_tokens and not running.any():
            return
        tokens = token[:, None]


def _tokens_present(tokens: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    """(batch, vocab) True for every real token of the prompt."""
    counts = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.int64, device=tokens.device)
    return counts.scatter_add(1, tokens, torch.ones_like(tokens) if mask is None else (mask != 0).long()) > 0
