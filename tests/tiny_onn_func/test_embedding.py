"""Token-keyed tables, logit cap and zero start: by loops, in generation, mapped, at the edges of documents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import vmap

from tests.helpers import seeded, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.embedding import ngram_embedding, ngram_rows
from tiny_onn_func.hashing import NO_TOKEN, mix
from tiny_onn_func.huggingface.pretrained import inexpressible, load_pretrained, save_pretrained
from tiny_onn_func.inference.decode import decode, start_decoding
from tiny_onn_func.params import count_active_flops, count_active_params, param_specs
from tiny_onn_func.tree import flatten, stack, to_device, tree_map, unflatten

ALL: dict[str, Any] = dict(
    ngram_order=4, ngram_buckets=7, value_embeddings=True, token_bias=True, logit_softcap=2.0, num_experts_per_tok=2
)
EACH = [{name: ALL[name]} for name in ("ngram_order", "value_embeddings", "token_bias", "logit_softcap")]


def a_model(**changes: Any) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters whose tables are not zero."""
    config, generator = tiny_config(**changes), seeded(3)
    params = init_params(config, generator, torch.float64)
    return tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), params), config


def row_of(tokens: list[int], config: ModelConfig) -> int:
    """Row of an n-gram, last token first, one Python number after the other."""
    key = mix(torch.tensor(tokens[0]))
    for back, token in enumerate(tokens[1:], 1):
        key = mix(key + mix(torch.tensor(token + back * config.vocab_size + 1)))
    return int(key) % config.ngram_buckets


def test_the_embedding_of_a_token_is_the_sum_over_the_n_grams_that_end_there() -> None:
    params, config = a_model(ngram_order=4, ngram_buckets=7)
    batch = tiny_batch(config, 3, 6, left=(0, 2, 1), right=(1, 0, 0))
    documents = batch.attention_mask.clone()
    documents[0, 3:] = documents[0, 3:] * 2  # a second document in the row
    came = ngram_embedding(params, batch.input_ids, documents, config)
    for row in range(3):
        for place in range(6):
            total = torch.zeros(config.hidden_size, dtype=torch.float64)
            for n in (2, 3, 4):
                spots = [place - back for back in range(n)]
                gram = [
                    int(batch.input_ids[row, at])
                    if at >= 0 and documents[row, at] == documents[row, place]
                    else NO_TOKEN
                    for at in spots
                ]
                total = total + params["ngram_embed"][n - 2, row_of(gram, config)]
            assert torch.allclose(came[row, place], total, atol=1e-12)


def test_the_n_grams_fill_the_rows_evenly() -> None:
    config = tiny_config(ngram_order=3, ngram_buckets=16, vocab_size=20)
    grams = torch.cartesian_prod(*[torch.arange(20)] * 3)  # all of three tokens
    rows = ngram_rows(grams, torch.ones_like(grams), config)
    pairs, triples = rows[::20, 1, 0].bincount(minlength=16), rows[:, 2, 1].bincount(minlength=16)
    for counts, expected in ((pairs, 400 / 16), (triples, 8000 / 16)):
        assert (counts - expected).square().sum() / expected < 45  # 15 degrees of freedom: 1 in 10,000


def test_an_n_gram_does_not_reach_into_another_document_or_padding() -> None:
    _, config = a_model(**ALL)
    ids = torch.randint(13, (1, 8), generator=seeded(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    other = ids.clone()
    other[0, :2] = (other[0, :2] + 1) % 13
    rows = ngram_rows(ids, mask, config)
    assert torch.equal(rows[:, 2:], ngram_rows(other, mask, config)[:, 2:])
    other[0, 2:5] = (other[0, 2:5] + 1) % 13
    assert torch.equal(rows[:, 5:], ngram_rows(other, mask, config)[:, 5:])
    alone = ngram_rows(ids[:, 5:], mask[:, 5:], config)
    assert torch.equal(rows[:, 5:], alone)


@pytest.mark.parametrize("changes", [*EACH, ALL])
def test_each_setting_changes_the_logits_of_the_same_seed_and_none_by_default(changes: dict[str, Any]) -> None:
    batch = tiny_batch(tiny_config())
    params, config = a_model(**changes)
    without = {name: leaf for name, leaf in flatten(params).items() if name in param_specs(tiny_config())}
    assert ("ngram_embed" in params) == ("ngram_order" in changes)
    plain = forward(unflatten(without), batch.input_ids, tiny_config(num_experts_per_tok=config.num_experts_per_tok))[0]
    assert not torch.allclose(forward(params, batch.input_ids, config)[0], plain)


@pytest.mark.parametrize("left", [(0, 0, 0), (2, 0, 1)])
def test_generation_reads_the_same_logits_as_the_whole_text(left: tuple[int, ...]) -> None:
    params, config = a_model(**ALL)
    ids = torch.randint(13, (3, 9), generator=seeded(2))
    mask = (torch.arange(9) >= torch.tensor(left)[:, None]).long()
    whole, _ = forward(params, ids, config, attention_mask=mask)
    state = start_decoding(params, config, 3, 9, attention_mask=mask[:, :5])
    for _ in range(2):  # column 0 begins anew
        assert torch.allclose(decode(state, ids[:, :5], 0).logits, whole[:, 4], atol=1e-6)
        for at in range(5, 9):
            assert torch.allclose(decode(state, ids[:, at : at + 1], at).logits, whole[:, at], atol=1e-6)


def test_runs_in_one_call_are_those_one_after_another() -> None:
    models = [a_model(**ALL) for _ in range(2)]
    params, config = [tree_map(lambda t, k=k: t * (1 + k), model[0]) for k, model in enumerate(models)], models[0][1]
    ids = torch.randint(13, (2, 2, 5), generator=seeded(4))
    alone = torch.stack([forward(own, one, config)[0] for own, one in zip(params, ids, strict=True)])
    assert torch.allclose(forward(stack(params), ids, config)[0], alone, atol=1e-12)
    mapped = vmap(lambda own, one: forward(own, one, config)[0])(stack(params), ids)
    assert torch.allclose(mapped, alone, atol=1e-12)


def test_logits_stay_within_the_cap() -> None:
    params, config = a_model(logit_softcap=0.5)
    big = {**params, "embed_tokens": params["embed_tokens"] * 1e3}
    logits, _ = forward(big, tiny_batch(config).input_ids, config)
    assert logits.abs().max() <= 0.5


def test_with_a_zero_start_the_layers_add_nothing_at_first() -> None:
    config = tiny_config(zero_init=True)
    params = init_params(config, seeded(0), torch.float64)
    ids = tiny_batch(config).input_ids
    shallow = {**params, "layers": tree_map(lambda leaf: leaf[:1], params["layers"])}
    once = forward(shallow, ids, tiny_config(zero_init=True, num_hidden_layers=1))[0]
    assert torch.equal(forward(params, ids, config)[0], once)


def test_tables_cost_no_arithmetic_and_begin_at_zero() -> None:
    config = tiny_config(**{**ALL, "logit_softcap": 0.0})
    plain = tiny_config(num_experts_per_tok=2)
    assert count_active_flops(config, 2.0, 8) == count_active_flops(plain, 2.0, 8)
    params, same = (init_params(each, seeded(0)) for each in (config, plain))
    ids = tiny_batch(plain).input_ids
    assert torch.equal(forward(params, ids, config)[0], forward(same, ids, plain)[0])


def test_a_token_uses_a_row_of_each_table() -> None:
    sizes = dict(num_experts_per_tok=2, vocab_size=20, hidden_size=8, num_hidden_layers=2)
    more = tiny_config(ngram_order=4, ngram_buckets=7, value_embeddings=True, token_bias=True, **sizes)
    rows = 3 * 8 + 2 * (more.num_key_value_heads * more.head_dim + 8)
    assert count_active_params(more, 2.0) - count_active_params(tiny_config(**sizes), 2.0) == pytest.approx(rows)


def test_nothing_is_read_back_from_a_device() -> None:
    params, config = a_model(**ALL)
    batch = to_device(tiny_batch(config), "meta")
    assert forward(to_device(params, "meta"), batch.input_ids, config, attention_mask=batch.attention_mask)[0].is_meta


@pytest.mark.parametrize("changes", [*EACH, ALL])
def test_a_folder_of_our_own_keeps_them_and_qwen3_moe_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    params, config = a_model(**(changes | {"num_experts_per_tok": 2}))
    params["layers"]["moe"]["router_bias"].zero_()
    name = next(iter(changes))
    assert inexpressible(params, config) == f"model.{name} {changes[name]}"
    save_pretrained(params, config, tmp_path / "model")
    loaded, same = load_pretrained(tmp_path / "model")
    assert same == config
    assert all(torch.equal(leaf, flatten(loaded)[key]) for key, leaf in flatten(params).items())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ngram_order": 0}, "model.ngram_order: expected a whole number, 1 to 8, got 0"),
        ({"ngram_order": 9}, "model.ngram_order: expected a whole number, 1 to 8, got 9"),
        ({"ngram_buckets": 0}, "model.ngram_buckets: expected a whole number, 1 to 2147483648, got 0"),
        ({"logit_softcap": -1.0}, "model.logit_softcap: expected a finite number, 0 or more, got -1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        tiny_config(**changes)
