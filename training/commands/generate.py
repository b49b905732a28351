"""`tiny-onn generate`: write text with a run or a model folder, token by token."""

import codecs
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_onn_func.inference.generate import stream
from tiny_onn_func.inference.sampling import SamplingParams
from tiny_onn_func.routing import Routing
from tiny_onn_func.tree import to_device
from training.data.tokenizer import BYTES, TURN_END, Tokenizer
from training.errors import UserError, flag
from training.run.device import choose_device
from training.run.finished import open_writer

NEXT = "\n\n"  # between two samples


def stream_run(
    folder: str | Path,
    prompt: str | None,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    context: int | None = None,
    stops: Iterable[str] = (),
    go_on: bool = False,
    show_experts: bool = False,
    width: int | None = None,
    seed: int = 0,
    num_samples: int = 1,
    device: str = "auto",
) -> Iterator[str]:
    """Yield the prompt, then its continuation piece by piece; the same seed gives the same text.

    Args:
        folder: RUN, a checkpoint in one, or a folder of Hugging Face (`open_writer`).
        prompt: text to continue; "" begins a document, None takes the run's own.
        tokens: how many to write at most.
        context: how many of the last tokens attention sees; None: as many as in training, `sequence_length`, because
            the model never saw two tokens further apart (all of them for a folder of Hugging Face); 0: all of them, as
            `transformers` does.
        stops: texts of one token each that end the text, beside the end of a document and, where there is one, of a
            turn; what ended the text is its last token.
        go_on: whether to write on after the end of a document or of a turn.
        show_experts: whether lines follow that say which experts every token visited, each of at most `width`.
        device: auto, cpu, cuda, cuda:N or mps; sampled on the CPU in any case.
        num_samples: how many texts, one after the other, under a line with their number.
    """
    for key, value in (("tokens", tokens), ("seed", seed)):
        if not 0 <= value < 2**63:
            raise UserError(f"{flag(key)}: expected 0 to 2**63 - 1, got {value}")
    if context is not None and context < 0:
        raise UserError(f"--context: expected 0 (all tokens) or more, got {context}")
    if num_samples < 1:
        raise UserError(f"--num-samples: expected 1 or more, got {num_samples}")
    sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty)
    try:
        sampling.check()
    except ValueError as error:  # "top_k: expected ..."
        key, _, text = str(error).partition(": ")
        raise UserError(f"{flag(key)}: {text}") from None
    place, _ = choose_device(device, key="--device")
    model, params, tokenizer, trained_context, budget, own_prompt = open_writer(folder)
    params = to_device(params, place)
    prompt, generator = own_prompt if prompt is None else prompt, torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(tokenizer.prompt(prompt).astype("int64"))[None].to(place)
    for number in range(1, num_samples + 1):
        read: list[TokenRoutes] = []
        sampled = stream(
            params, ids, model, generator, max_new_tokens=tokens,
            context_length=trained_context if context is None else context or None,
            sampling=sampling,
            stop_tokens=stop_tokens(tokenizer, stops, go_on=go_on), surprise_budget=budget,
            watch=partial(_note, read) if show_experts else None,
        )  # fmt: skip
        written = ids[0].tolist()
        if num_samples > 1:
            yield f"{'' if number == 1 else NEXT}--- {number} of {num_samples} ---\n"
        yield prompt
        yield from decode_stream(_kept(sampled, written), tokenizer)
        if show_experts:
            yield "\n"
            yield from ("\n" + line for line in expert_lines(written, read, tokenizer, width))


def _note(read: list["TokenRoutes"], *step: Any) -> None:
    read.extend(token_routes(*step))


def _kept(sampled: Iterable[Tensor], written: list[int]) -> Iterator[int]:
    for token in sampled:
        written.append(int(token))
        yield written[-1]


def stop_tokens(tokenizer: Tokenizer, texts: Iterable[str] = (), *, go_on: bool = False) -> tuple[int, ...]:
    """Ids that end a text: document boundary and end of turn, unless `go_on`, and the tokens of `texts`.

    Raises:
        UserError: a text that is not exactly one token.
    """
    ends = {} if go_on else {tokenizer.boundary: None, tokenizer.special.get(TURN_END, tokenizer.boundary): None}
    for text in texts:
        ids = tokenizer.encode_prompt(text).tolist()
        if len(ids) != 1:
            raise UserError(f"--stop: expected a text of one token, got {text!r} of {len(ids)}; shorten it")
        ends[ids[0]] = None
    return tuple(ends)


def decode_stream(tokens: Iterable[int], tokenizer: Tokenizer = BYTES) -> Iterator[str]:
    """Decode tokens as they come, each character as soon as it is whole; joined, the text is that of `decode`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.spelled(token))
    yield decoder.decode(b"", final=True)


TokenRoutes = tuple[tuple[tuple[int, float], ...], ...]  # of one token: the (expert, weight) pairs of each layer


def token_routes(tokens: Tensor, routes: tuple[Routing, ...]) -> list[TokenRoutes]:
    """Routes of every token, best expert first, from the tokens and routing that `stream` reports for one row."""
    layers = [list(zip(*(part.tolist() for part in routing), strict=True)) for routing in routes]
    return [
        tuple(
            tuple((expert, weight) for expert, weight, kept in zip(*layer[place], strict=True) if kept)
            for layer in layers
        )
        for place in range(tokens.shape[1])
    ]


def expert_lines(
    tokens: list[int], routes: list[TokenRoutes], tokenizer: Tokenizer = BYTES, width: int | None = None
) -> Iterator[str]:
    """One line a token: its spelling, and `expert:weight in percent` for each layer, best first.

    The last token has no routes: it was written, but nobody read it. Lines longer than `width` are cut.
    """
    names = [repr(tokenizer.spelled(token).decode("utf-8", "backslashreplace")) for token in tokens]
    column = max(5, *map(len, names))
    lines = [f"{'token':{column}}  expert:percent, layer by layer"]
    for place, name in enumerate(names):
        layers = routes[place] if place < len(routes) else ()
        shown = (" ".join(f"{expert}:{weight:.0%}"[:-1] for expert, weight in layer) for layer in layers)
        lines.append(f"{name:{column}}  {' | '.join(shown) or 'written, not read'}")
    for line in lines:
        yield line if width is None or len(line) <= width else line[: max(0, width - 3)] + "..."
