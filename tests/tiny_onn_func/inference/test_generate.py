"""Generation: with a cache what it would be without, alone what it is in a batch; sampling, stopping, experts shown."""

import math
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import (
    CHOICES,
    TINY,
    assert_close,
    assert_same_bits,
    configs,
    seeded,
    shape_router,
    spread_params,
    tiny_config,
)
from tiny_onn_func import ModelConfig, forward, generate, init_params, save_pretrained
from tiny_onn_func.inference import expert_visits
from tiny_onn_func.inference.decode import decode, start_decoding
from tiny_onn_func.inference.generate import stream
from tiny_onn_func.inference.sampling import SamplingParams, penalize, sample
from tiny_onn_func.tree import flatten, unflatten
from training.cli import main
from training.commands.generate import expert_lines, stop_tokens
from training.data.tokenizer import BYTES
from training.errors import UserError
from training.run.config import RunConfig
from training.run.settings import save_settings
from training.storage.checkpoint import save_checkpoint

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
LONG = torch.tensor([[1, 2, 3, 3, 9, 12, 0], [4, 5, 6, 11, 2, 2, 7]])
ROUTINGS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic, floor and cap": dict(min_experts_per_tok=2, max_experts_per_tok=3),
    "fixed": dict(num_experts_per_tok=2),
    "one expert": dict(num_experts=1, num_experts_per_tok=1),
    "token": dict(routing="token"),
    "hash": dict(routing="hash"),
    "hash, fixed": dict(routing="hash", num_experts_per_tok=3),
    "thresholds": dict(routing="thresholds"),
    **CHOICES,
    "untied": dict(tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=2),
}


def excited(params: dict[str, Any]) -> dict[str, Any]:
    """What layers add outweighs the embedding: with a tied head, small layers would repeat the last token for ever."""
    flat = flatten(params)
    for name in ("layers.self_attn.o_proj", "layers.moe.w2"):
        flat[name] = flat[name] * 30
    flat["norm"] = flat["norm"] * 10
    return unflatten(flat)


def wild(config: ModelConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Any]:
    """A model whose next token hangs on the whole text, with a selection bias that changes decisions."""
    params = excited(spread_params(config, seed, dtype))
    bias = params["layers"]["moe"]["router_bias"]
    bias += 0.3 * torch.rand(bias.shape, generator=seeded(seed), dtype=bias.dtype)
    return params


def state(seed: int = 0, prompt: Tensor = PROMPT, **how: Any) -> Tensor:
    return generate(wild(), prompt, TINY, seeded(seed), **{"max_new_tokens": 8, **how})


def uncached(prompt: Tensor, new: int, config: ModelConfig = TINY, params: Any = None, **how: Any) -> Tensor:
    """The definition: the whole text through `forward` for every token."""
    for _ in range(new):
        logits, _ = forward(params or wild(config), prompt, config, **how)
        prompt = torch.cat((prompt, logits[:, -1:].argmax(dim=-1)), dim=1)
    return prompt


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_and_routes_with_a_cache_are_those_of_forward(routing: str, dtype: torch.dtype) -> None:
    config = tiny_config(**ROUTINGS[routing])
    params, tolerance = wild(config, dtype), 2e-5 if dtype == torch.float32 else 1e-12
    for tokens in (LONG, LONG[:1]):
        wanted, trace = forward(params, tokens, config, surprise_budget=0.7)
        opened = start_decoding(params, config, len(tokens), 7, surprise_budget=0.7)
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
            logits, routes = decode(opened, tokens[:, start:end], start)
            assert logits.dtype == dtype
            assert_close(logits, wanted[:, end - 1], tolerance, f"logits of token {end - 1}")
            for layer, route in enumerate(routes):
                used, place = route.expert_ids.shape[1], slice(start, end)
                rows = [part[layer].view(len(tokens), 7, -1)[:, place].flatten(0, 1) for part in trace[2:]]
                assert torch.equal(route.active, rows[2][:, :used])
                assert not rows[2][:, used:].any()
                assert torch.equal(route.expert_ids[route.active], rows[0][rows[2]])
                assert_close(route.weights, rows[1][:, :used], tolerance, "weights")


@given(config=configs(), seed=st.integers(0, 99), batch=st.integers(1, 3), length=st.integers(1, 5))
def test_greedy_text_with_a_cache_is_that_without(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    params = excited(shape_router(init_params(config, seeded(seed), torch.float64), "spread"))
    prompt = torch.randint(config.vocab_size, (batch, length), generator=seeded(seed))
    tokens = generate(params, prompt, config, seeded(0), max_new_tokens=6, temperature=0.0)
    assert torch.equal(tokens, uncached(prompt, 6, config, params))


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), routing=st.sampled_from(list(ROUTINGS)))
def test_a_padded_row_becomes_what_it_would_be_alone(lengths: list[int], routing: str) -> None:
    config = tiny_config(**ROUTINGS[routing])
    params, width = wild(config), max(lengths)
    rows = [torch.randint(config.vocab_size, (length,), generator=seeded(length)) for length in lengths]
    noise = torch.randint(config.vocab_size, (len(rows), width), generator=seeded(9))
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    prompt = torch.stack([torch.cat((pad[: width - len(row)], row)) for pad, row in zip(noise, rows, strict=True)])
    how: dict[str, Any] = dict(max_new_tokens=5, temperature=0.0, repetition_penalty=1.3, context_length=6)
    together = generate(params, prompt, config, seeded(0), attention_mask=mask, **how)
    assert torch.equal(together[:, :width], prompt)
    for row, continuation in zip(rows, together[:, width:], strict=True):
        alone = generate(params, row[None], config, seeded(0), **how)
        assert torch.equal(continuation, alone[0, len(row) :])


def test_padding_leaves_the_logits_of_an_unpadded_row() -> None:
    """Positions begin at the first real token; the float32 angles of a shifted row would agree to 1e-6 only."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    padded = decode(start_decoding(wild(), TINY, 2, 7, attention_mask=mask), LONG, 0).logits
    assert_close(padded[:1], forward(wild(), LONG[:1, 3:], TINY)[0][:, -1], 1e-12)
    assert_close(padded[1:], forward(wild(), LONG[1:], TINY)[0][:, -1], 1e-12)


def test_one_window_is_all_that_a_single_layer_sees_and_without_one_it_sees_all() -> None:
    config = tiny_config(num_hidden_layers=1)
    other = torch.cat((LONG.flip(1), LONG), dim=1)
    same = torch.cat((LONG, LONG), dim=1)

    def added(prompt: Tensor, window: int | None) -> Tensor:
        params = wild(config)
        return generate(params, prompt, config, seeded(0), max_new_tokens=9, temperature=0.0, context_length=window)[
            :, 14:
        ]

    assert torch.equal(added(same, 7), added(other, 7))

    def logits(prompt: Tensor, window: int) -> Tensor:
        return decode(start_decoding(wild(config), config, 2, 14, context_length=window), prompt, 0).logits

    assert_close(logits(same, 7), logits(other, 7), 1e-12)
    assert not torch.allclose(logits(same, 8), logits(other, 8))
    assert not torch.equal(added(same, None), added(other, None))


@pytest.mark.parametrize("window", [1, 2, 4, 99])
def test_a_window_hides_what_is_further_back_from_prompt_and_text_alike(window: int) -> None:
    """Reading at once and reading one by one agree, and a window as long as the text changes nothing."""
    at_once = decode(start_decoding(wild(), TINY, 2, 7, context_length=window), LONG, 0).logits
    opened = start_decoding(wild(), TINY, 2, 7, context_length=window)
    for place in range(7):
        one_by_one = decode(opened, LONG[:, place : place + 1], place).logits
    assert_close(one_by_one, at_once, 1e-12)
    whole = forward(wild(), LONG, TINY)[0][:, -1]
    assert torch.allclose(at_once, whole) == (window == 99)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_few_and_many_tokens_visit_their_experts_alike(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(**ROUTINGS[routing])
    params, tokens = wild(config), torch.randint(13, (40, 1), generator=seeded(0))
    wanted, _ = forward(params, tokens, config)
    for few in (True, False):
        monkeypatch.setattr(expert_visits, "_are_few", lambda *_, few=few: few)
        for batch in (40, 5, 1):
            logits = [
                decode(start_decoding(params, config, len(part), 1), part, 0).logits for part in tokens.split(batch)
            ]
            assert_close(torch.cat(logits), wanted[:, -1], 1e-12, f"few: {few}, batch {batch}")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_expert_spoils_only_the_tokens_that_visit_it(bad: float) -> None:
    config = tiny_config(num_experts_per_tok=2)
    params, tokens = wild(config), torch.randint(13, (40, 1), generator=seeded(0))
    ids = forward(params, tokens, config)[1].expert_ids[-1]
    broken = int(ids[0, 0])
    params["layers"]["moe"]["w1"][-1, broken] = bad
    for batch in (40, 5):
        logits = [decode(start_decoding(params, config, len(part), 1), part, 0).logits for part in tokens.split(batch)]
        assert torch.equal(torch.cat(logits).isnan().any(dim=-1), (ids == broken).any(dim=-1))


def test_parameters_are_left_as_they_were() -> None:
    params, before = wild(), wild()
    generate(params, PROMPT, TINY, seeded(0), max_new_tokens=4)
    assert_same_bits(params, before)


def test_what_comes_out_can_be_trained_on() -> None:
    params, tokens = wild(), state()
    params["embed_tokens"].requires_grad_()
    forward(params, tokens, TINY)[0].sum().backward()
    assert params["embed_tokens"].grad is not None


def test_transformers_writes_the_same_greedy_text_in_uneven_batches(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(vocab_size=40, hidden_size=16, num_experts_per_tok=2, moe_intermediate_size=8)
    params = excited(spread_params(config, 3, torch.float32))
    save_pretrained(params, config, tmp_path / "model")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.randint(1, 40, (3, 6), generator=seeded(5))
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [0] * 5 + [1]])
    prompt = prompt * mask  # the peer's penalty counts padding as text: ours never looks at it, so no penalty here
    stop = int(
        generate(params, prompt, config, seeded(0), max_new_tokens=9, attention_mask=mask, temperature=0.0)[0, 9]
    )
    theirs = peer.generate(
        prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    ours = generate(
        params, prompt, config, seeded(0), attention_mask=mask, max_new_tokens=40, temperature=0.0, stop_tokens=[stop],
        pad_token=0,
    )  # fmt: skip
    assert torch.equal(ours, theirs)
    assert len({*ours[1].tolist()}) > 4
    scores, ids = torch.randn(3, 40, generator=seeded(1)), torch.randint(40, (3, 6), generator=seeded(2))
    present = torch.zeros(3, 40, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(
        penalize(scores, present, 1.7), transformers.RepetitionPenaltyLogitsProcessor(penalty=1.7)(ids, scores.clone())
    )


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_the_same_generator_state_gives_the_same_text_and_another_another() -> None:
    assert torch.equal(state(0), state(0))
    assert not torch.equal(state(0), state(1))
    assert state(0).shape == (2, 11)
    assert torch.equal(state(0)[:, :3], PROMPT)


@pytest.mark.parametrize(
    "how", [dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-3), dict(top_k=1, top_p=0.5)]
)
def test_temperature_zero_one_candidate_and_a_tiny_nucleus_are_the_argmax(how: dict[str, Any]) -> None:
    for seed in range(2):
        assert torch.equal(state(seed, **how), uncached(PROMPT, 8))


def test_nothing_asked_is_the_prompt_alone_and_texts_do_not_see_each_other() -> None:
    assert torch.equal(state(max_new_tokens=0), PROMPT)
    together = state(temperature=0.0)
    assert torch.equal(together, torch.cat([state(prompt=row[None], temperature=0.0) for row in PROMPT]))


def test_a_stream_yields_the_tokens_of_generate() -> None:
    sizes: dict[str, Any] = dict(max_new_tokens=5, context_length=4)
    sampling = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    streamed = list(stream(wild(), PROMPT, TINY, seeded(4), sampling=sampling, **sizes))
    whole = generate(wild(), PROMPT, TINY, seeded(4), temperature=0.7, top_k=5, top_p=0.9, **sizes)
    assert torch.equal(torch.stack(streamed, dim=1), whole[:, 3:])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "wanted"),
    [
        (1.0, None, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (1.0, 2, 1.0, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 99, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (1.0, None, 0.65, [4 / 7, 3 / 7, 0, 0]),
        (1.0, None, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
        (1.0, None, 0.35, [1, 0, 0, 0]),
        (0.5, None, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (1.0, 3, 0.5, [4 / 7, 3 / 7, 0, 0]),  # top-k first: 4 / 9 of the mass is not yet half
    ],
)
def test_tokens_are_drawn_from_the_truncated_distribution(
    temperature: float, top_k: int | None, top_p: float, wanted: list[float]
) -> None:
    draws, order = 4000, [2, 0, 3, 1]  # where the ranks lie in the vocabulary
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + 5
    tokens = sample(logits.expand(draws, 4), seeded(0), SamplingParams(temperature, top_k, top_p))
    counts = Counter(tokens.tolist())
    for token, p in zip(order, wanted, strict=True):
        assert abs(counts[token] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws), f"{counts}, wanted {wanted}"


def test_a_temperature_near_zero_is_the_argmax_and_no_overflow() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, seeded(0), SamplingParams(temperature=1e-40)).tolist() == [1]


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones_of_seen_tokens() -> None:
    logits, present = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalize(logits, present, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]
    assert penalize(logits, present, 1.0) is logits


def test_a_large_penalty_writes_every_token_before_one_comes_back() -> None:
    """With all logits made positive, a seen token wins only when no other is left; the prompt counts, too."""
    params = wild()
    tokens = generate(params, PROMPT, TINY, seeded(0), max_new_tokens=10, temperature=0.0, repetition_penalty=1e9)
    for row in tokens:
        logits = forward(params, row[None, :-1], TINY)[0][0]
        for place in range(2, 12):
            new, earlier = int(row[place + 1]), {*row[: place + 1].tolist()}
            if any(logits[place, other] > 0 for other in {*range(13)} - earlier):
                assert new not in earlier
    assert not torch.equal(tokens, state(max_new_tokens=10, temperature=0.0))


def test_a_row_that_stops_is_filled_up_and_the_text_ends_with_its_last_row() -> None:
    free = state(temperature=0.0, max_new_tokens=12)[:, 3:]
    first, second = ([*row.tolist()] for row in free)
    stop = next(token for token in first if token in second and first.index(token) != second.index(token))
    ends = [row.index(stop) for row in (first, second)]
    padded = state(temperature=0.0, max_new_tokens=12, stop_tokens=(stop,), pad_token=0)[:, 3:]
    assert padded.shape[1] == max(ends) + 1
    for row, wanted, end in zip(padded.tolist(), (first, second), ends, strict=True):
        assert row == wanted[: end + 1] + [0] * (max(ends) - end)
    filled = state(temperature=0.0, max_new_tokens=12, stop_tokens=(stop,))[:, 3:]
    assert torch.equal(filled, torch.where((padded == 0) & (filled == stop), stop, padded))


def test_stop_tokens_may_be_an_iterator() -> None:
    free = state(temperature=0.0)
    stops = [int(token) for token in free[:, 3].unique()]
    wanted = state(temperature=0.0, stop_tokens=stops)
    assert torch.equal(state(temperature=0.0, stop_tokens=iter(stops)), wanted)
    assert wanted.shape[1] == 4, "each row stops at once"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_before_a_token_is_made_of_them(
    broken: float, temperature: float
) -> None:
    params = wild()
    params["norm"][0] = broken
    with pytest.raises(ValueError, match=r"^logits: expected finite numbers, got (nan|-?inf); the parameters are "):
        generate(params, PROMPT, TINY, seeded(0), max_new_tokens=3, temperature=temperature)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("max_new_tokens", dict(max_new_tokens=-1)),
    ("context_length", dict(context_length=0)),
    ("temperature", dict(temperature=-0.1)),
    ("temperature", dict(temperature=math.nan)),
    ("top_k", dict(top_k=0)),
    ("top_p", dict(top_p=0.0)),
    ("top_p", dict(top_p=1.1)),
    ("repetition_penalty", dict(repetition_penalty=0.0)),
    ("repetition_penalty", dict(repetition_penalty=math.nan)),
    ("repetition_penalty", dict(repetition_penalty=math.inf)),
    ("repetition_penalty", dict(repetition_penalty=1e-45)),
    ("repetition_penalty", dict(repetition_penalty=1e10)),
    ("stop_tokens", dict(stop_tokens=(1, 13))),
    ("stop_tokens", dict(stop_tokens=(-1,))),
    ("pad_token", dict(pad_token=13)),
    ("prompt", dict(prompt=torch.zeros(1, 0, dtype=torch.int64))),
    ("prompt", dict(prompt=torch.zeros(0, 3, dtype=torch.int64))),
    ("prompt", dict(prompt=torch.tensor([[0, 13]]))),
    ("prompt", dict(prompt=torch.tensor([[0, -1]]))),
    ("attention_mask", dict(attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))),
    ("attention_mask", dict(attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]))),
    ("attention_mask", dict(attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]).bool())),
    ("attention_mask", dict(attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())),
    ("attention_mask", dict(attention_mask=torch.ones(2, 3, dtype=torch.int32))),
    ("attention_mask", dict(attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]))),
    ("attention_mask", dict(attention_mask=torch.tensor([[1, 2, 2], [1, 1, 1]]))),
    ("surprise_budget", dict(surprise_budget=0.0)),
]


@pytest.mark.parametrize(("key", "how"), BAD, ids=str)
def test_a_bad_argument_of_generate_is_refused_by_its_name(key: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected .*, got "):
        state(**how)


def test_a_stop_token_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"^stop_tokens: expected tokens from 0 to 12, got 13"):
        state(stop_tokens=(13,))


def test_a_mask_of_bool_writes_the_text_of_its_numbers() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert torch.equal(state(attention_mask=mask.bool()), state(attention_mask=mask))


def mask_with(value: int, *places: int) -> Tensor:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, list(places)] = value
    return mask


@pytest.mark.parametrize(
    ("key", "how"),
    [
        ("surprise_budget", dict(surprise_budget=5.0)),
        ("surprise_budget", dict(surprise_budget=math.nan)),
        ("context_length", dict(context_length=0)),
        ("context_length", dict(context_length=-3)),
        ("batch", dict(batch=0)),
        ("columns", dict(columns=0)),
        ("attention_mask", dict(attention_mask=mask_with(0, 5, 6))),
        ("attention_mask", dict(attention_mask=mask_with(0, 2, 4).bool())),
        ("attention_mask", dict(attention_mask=mask_with(2, 4, 5, 6))),
        ("attention_mask", dict(attention_mask=mask_with(1), columns=6)),
        ("attention_mask", dict(attention_mask=mask_with(1)[:1])),
    ],
    ids=str,
)
def test_a_bad_argument_of_start_decoding_is_refused_by_its_name(key: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected .*, got "):
        start_decoding(wild(), TINY, **{"batch": 2, "columns": 9, **how})


def test_tokens_that_do_not_follow_those_read_are_refused() -> None:
    opened = start_decoding(wild(), TINY, 2, 9, attention_mask=mask_with(0, 0))
    first = decode(opened, LONG, 0).logits
    for at in (8, 3, -1):
        with pytest.raises(ValueError, match=f"^start: expected 7, the column behind what was read, or 0, got {at}"):
            decode(opened, LONG[:, :1], at)
    for tokens, start, message in (
        (LONG[:1, :1], 7, "tokens: expected a row for each of 2 texts, got 1"),
        (LONG[:, :2], 7, "tokens: expected one of each row behind column 0, got 2"),
        (LONG[:, :3], 0, "tokens: expected the mask's 7 of each row, got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            decode(opened, tokens, start)
    decode(opened, LONG[:, :1], 7)
    decode(opened, LONG[:, :1], 8)
    with pytest.raises(ValueError, match=r"^tokens: expected at most 9 columns, got 10"):
        decode(opened, LONG[:, :1], 9)
    assert torch.equal(decode(opened, LONG, 0).logits, first), "a text begins anew at 0"


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model, as if it had trained on 8 tokens at a time."""
    model = tiny_config(vocab_size=257, num_experts_per_tok=2)
    folder = tmp_path_factory.mktemp("generate") / "run"
    folder.mkdir()
    save_settings(RunConfig(model=model, sequence_length=8), folder / "config.yaml")
    save_checkpoint(folder, {"params": wild(model, torch.float32), "step": torch.tensor(1)}, asdict(model), keep=1)
    return folder


def written(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "def ", *flags]) == 0
    return capsys.readouterr().out


def test_show_experts_prints_a_line_for_every_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--tokens", "6", "--temperature", "0", "--no-stop")
    plain, shown = written(run, capsys, *flags), written(run, capsys, *flags, "--show-experts")
    assert shown.startswith(plain)
    _, *lines = shown[len(plain) :].strip("\n").split("\n")
    assert len(lines) == 4 + 6
    assert [line[:3] for line in lines[:4]] == ["'d'", "'e'", "'f'", "' '"]
    assert lines[-1].endswith("written, not read")
    model = tiny_config(vocab_size=257, num_experts_per_tok=2)
    _, trace = forward(wild(model, torch.float32), torch.tensor([list(b"def ")]), model)
    for place, line in enumerate(lines[:4]):
        layers = [
            " ".join(
                f"{e}:{w * 100:.0f}" for e, w in zip(trace.expert_ids[i, place], trace.weights[i, place], strict=True)
            )
            for i in range(2)
        ]
        assert line.endswith("  " + " | ".join(layers))


def test_expert_lines_fit_into_a_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    shown = written(run, capsys, "--tokens", "0", "--show-experts").splitlines()
    assert max(map(len, shown)) == 20
    assert shown[-1].endswith("...") or len(shown[-1]) <= 20


def test_tokens_without_routes_or_text_have_a_line_too() -> None:
    lines = list(expert_lines([10, 0xFF, 256], [(((3, 0.754), (0, 0.246)), ()), ((), ())]))
    assert [line.split() for line in lines[1:]] == [
        [r"'\n'", "3:75", "0:25", "|"], [r"'\\xff'", "|"], ["'<|endoftext|>'", "written,", "not", "read"],
    ]  # fmt: skip


def test_the_end_of_a_document_ends_the_text_unless_it_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_tokens(BYTES) == (256,)
    assert stop_tokens(BYTES, ["\n"]) == (256, 10)
    assert stop_tokens(BYTES, ["\n"], go_on=True) == (10,)
    with pytest.raises(UserError, match="--stop: expected a text of one token, got 'ab' of 2"):
        stop_tokens(BYTES, ["ab"])
    whole = written(run, capsys, "--tokens", "300", "--no-stop", "--temperature", "9", "--seed", "3")
    assert "<|endoftext|>" in whole[:-14]
    cut = written(run, capsys, "--tokens", "300", "--temperature", "9", "--seed", "3")
    assert cut == whole[: whole.index("<|endoftext|>") + 13] + "\n"


def test_the_context_of_a_run_is_that_of_its_training_and_zero_is_all(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tokens", "30", "--temperature", "0", "--no-stop")
    as_trained, everything = written(run, capsys, *flags), written(run, capsys, *flags, "--context", "0")
    assert as_trained == written(run, capsys, *flags, "--context", "8")
    assert everything == written(run, capsys, *flags, "--context", "34")
    assert as_trained != everything


@pytest.mark.parametrize("flags", [("--temperature", "0"), (), ("--repetition-penalty", "1e-45")], ids=str)
def test_a_run_with_broken_weights_and_a_penalty_that_overflows_are_one_line(
    flags: tuple[str, ...], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_config(vocab_size=257, num_experts_per_tok=2)
    params = wild(model, torch.float32)
    if "--repetition-penalty" not in flags:
        params["norm"][0] = math.nan
    save_settings(RunConfig(model=model, sequence_length=8), tmp_path / "config.yaml")
    save_checkpoint(tmp_path, {"params": params, "step": torch.tensor(1)}, asdict(model), keep=1)
    assert main(["generate", str(tmp_path), "--tokens", "3", *flags]) == 2
    name = "--repetition-penalty" if "--repetition-penalty" in flags else "logits"
    assert re.fullmatch(rf"tiny-onn: {name}: expected .*, got .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flag", "value"), [("--tokens", -1), ("--tokens", 2**63), ("--context", -1), ("--seed", -1), ("--seed", 2**63)]
)
def test_a_flag_out_of_range_is_refused_by_its_own_name(
    flag: str, value: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), flag, str(value)]) == 2
    assert capsys.readouterr().err.startswith(f"tiny-onn: {flag}: expected 0 ")
