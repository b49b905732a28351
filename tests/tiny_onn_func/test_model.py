"""Configuration, parameters, the small pieces of a block, the dtypes of the decoder, and sampling."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import TINY, assert_close, assert_same_bits, configs, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.ops import rms_norm, rotary_angles, rotate, scale_gradient, swiglu_reference, wide_dtype
from tiny_onn_func.params import check_params, count_active_flops, count_active_params, count_params, param_specs
from tiny_onn_func.tree import flatten, unflatten

# ---- configuration -------------------------------------------------------------------------------------------------

SIZES = [field.name for field in dataclasses.fields(ModelConfig)[:8]]
REFUSED = [
    *((name, {name: bad}, str(bad)) for name in SIZES for bad in (0, -1)),
    ("num_key_value_heads", dict(num_attention_heads=4, num_key_value_heads=3), "divisor of num_attention_heads (4)"),
    ("num_key_value_heads", dict(num_attention_heads=2, num_key_value_heads=4), "got 4"),
    ("head_dim", dict(head_dim=3), "even"),
    ("num_experts_per_tok", dict(num_experts_per_tok=0), "got 0"),
    ("num_experts_per_tok", dict(num_experts_per_tok=-2), "got -2"),
    ("num_experts_per_tok", dict(num_experts_per_tok=5), "num_experts (4)"),
    ("max_experts_per_tok", dict(max_experts_per_tok=0), "got 0"),
    ("max_experts_per_tok", dict(max_experts_per_tok=5), "num_experts (4)"),
    ("min_experts_per_tok", dict(min_experts_per_tok=0), "got 0"),
    ("min_experts_per_tok", dict(min_experts_per_tok=5), "max_experts_per_tok (4)"),
    ("min_experts_per_tok", dict(min_experts_per_tok=3, max_experts_per_tok=2), "max_experts_per_tok (2)"),
    ("num_experts_per_tok", dict(num_experts_per_tok=4, max_experts_per_tok=2), "max_experts_per_tok (2), got 4"),
    ("num_experts_per_tok", dict(num_experts_per_tok=1, min_experts_per_tok=3), "min_experts_per_tok (3) to"),
    ("rms_norm_eps", dict(rms_norm_eps=math.inf), "a finite number, more than 0, got inf"),
    ("rope_theta", dict(rope_theta=math.inf), "a finite number, more than 0, got inf"),
    ("rms_norm_eps", dict(rms_norm_eps=0.0), "more than 0"),
    ("rms_norm_eps", dict(rms_norm_eps=math.nan), "got nan"),
    ("rope_theta", dict(rope_theta=-1.0), "more than 0"),
]
NO_NUMBERS = [
    *((name, bad, f"a whole number, got {bad!r}") for name in SIZES for bad in (3.0, True, "3", None)),
    ("num_experts_per_tok", 2.0, "a whole number, got 2.0"),
    ("min_experts_per_tok", True, "a whole number, got True"),
    ("min_experts_per_tok", None, "a whole number, got None"),
    ("max_experts_per_tok", 2.0, "a whole number, got 2.0"),
    ("rms_norm_eps", "1e-6", "a finite number, more than 0, got 1e-6"),
    ("rope_theta", True, "a finite number, more than 0, got True"),
]


@pytest.mark.parametrize(("key", "changes", "said"), REFUSED, ids=lambda value: str(value))
def test_a_size_out_of_range_is_refused_by_its_key(key: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}: expected .*, got ") as caught:
        tiny_config(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """Without the checker of types, which only the tests have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(("key", "bad", "said"), NO_NUMBERS, ids=str)
def test_what_is_no_whole_number_is_no_size(key: str, bad: Any, said: str) -> None:
    """31.0 and True are equal to whole numbers, and would make a model under another name."""
    with pytest.raises(ValueError, match=rf"^model\.{key}: expected {re.escape(said)}$"):
        tiny_config(**{key: bad})


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(SIZES, 1) | {"head_dim": 2},
        dict(num_experts_per_tok=4),
        dict(num_experts_per_tok=1),
        dict(num_experts_per_tok=3, min_experts_per_tok=3, max_experts_per_tok=3),
        dict(min_experts_per_tok=2, max_experts_per_tok=2),
        dict(max_experts_per_tok=4, min_experts_per_tok=4),
    ],
)
def test_sizes_at_the_edge_of_their_range_are_taken_and_run(changes: dict[str, int]) -> None:
    config = tiny_config(**changes)
    logits, _ = forward(init_params(config, seeded(0)), torch.zeros(1, 2, dtype=torch.int64), config)
    assert logits.shape == (1, 2, config.vocab_size)


def test_only_the_first_eight_sizes_are_required() -> None:
    required = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    assert required == SIZES
    config = ModelConfig(11, 8, 1, 2, 1, 4, 6, 4)
    assert config.num_experts_per_tok == DYNAMIC_K
    assert config.tie_word_embeddings


def test_a_configuration_is_a_value_that_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 9  # type: ignore[misc]
    assert tiny_config() == TINY
    assert hash(tiny_config()) == hash(TINY)


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({}, 4),
        (dict(max_experts_per_tok=3), 3),
        (dict(num_experts_per_tok=2), 2),
        (dict(num_experts_per_tok=2, max_experts_per_tok=3), 2),
    ],
)
def test_routes_per_token_is_the_fixed_k_or_the_cap_or_all(changes: dict[str, int], slots: int) -> None:
    assert tiny_config(**changes).routes_per_token == slots


# ---- parameters ----------------------------------------------------------------------------------------------------


@given(configs(), st.integers(0, 99))
def test_parameters_have_the_shapes_of_their_specs_and_are_counted_right(config: ModelConfig, seed: int) -> None:
    params = init_params(config, seeded(seed))
    specs = param_specs(config)
    assert {name: tuple(leaf.shape) for name, leaf in flatten(params).items()} == {n: s.shape for n, s in specs.items()}
    assert sum(leaf.numel() for leaf in flatten(params).values()) == count_params(config)
    check_params(params, config)
    assert_same_bits(params, init_params(config, seeded(seed)))


def test_the_leaves_that_others_touch_have_their_documented_shapes() -> None:
    config = tiny_config(num_experts=5)
    layers = init_params(config, seeded(0))["layers"]
    shapes = {name: tuple(layers["moe"][name].shape) for name in ("router", "w1", "w3", "w2")}
    assert shapes == {"router": (2, 8, 5), "w1": (2, 5, 8, 6), "w3": (2, 5, 8, 6), "w2": (2, 5, 6, 8)}


@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_a_count_by_hand(tied: bool) -> None:
    config = ModelConfig(100, 16, 3, 4, 2, 8, 24, 6, tie_word_embeddings=tied)
    attention = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 8  # q, k and v, o, two head norms
    expert = 3 * 16 * 24
    layer = 2 * 16 + attention + 16 * 6 + 6  # two norms, router with bias
    outside = 100 * 16 * (1 if tied else 2) + 16
    assert count_params(config) == outside + 3 * (layer + 6 * expert)
    assert count_active_params(config, 2.0) == outside + 3 * (layer + 2 * expert)
    assert count_active_params(config, 6.0) == count_params(config)
    assert count_active_params(config, 1.5) == outside + 3 * (layer + 1.5 * expert)
    assert count_active_params(config, 1 + 1 / 1024) == outside + 3 * (layer + (1 + 1 / 1024) * expert)


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": False}, {"routing": "hash"}], ids=str)
def test_flops_of_a_token_are_those_of_a_count_by_hand(sizes: dict[str, Any]) -> None:
    """V 13, D 8, 2 layers, 2 heads of 4 and 1 key head, F 6, E 4: the products of a token, two operations each."""
    attention, router, expert, head = 8 * 8 + 2 * 8 * 4 + 8 * 8, 8 * 4, 3 * 8 * 6, 8 * 13
    asked = 0 if sizes.get("routing") == "hash" else router
    for k, seq in ((1.0, 1), (2.5, 9)):
        attended = 2 * 8 * (seq + 1) / 2  # keys and values of the tokens up to this one, 2 heads of 4
        by_hand = 2 * (2 * (attention + asked + k * expert + attended) + head)
        assert count_active_flops(tiny_config(**sizes), k, seq) == by_hand


def test_another_seed_draws_other_matrices_and_every_matrix_is_its_own() -> None:
    first, second = (flatten(init_params(TINY, seeded(seed))) for seed in (0, 1))
    drawn = [name for name, spec in param_specs(TINY).items() if spec.std is not None]
    assert all(not torch.equal(first[name], second[name]) for name in drawn)
    assert not torch.equal(first["layers.moe.w1"], first["layers.moe.w3"])
    assert all(torch.equal(first[name], second[name]) for name in first.keys() - set(drawn))


def test_fresh_parameters_have_the_spread_of_their_spec() -> None:
    config = tiny_config(hidden_size=64, moe_intermediate_size=48, vocab_size=300, tie_word_embeddings=False)
    params = flatten(init_params(config, seeded(0)))
    wanted = {
        "embed_tokens": 0.02,
        "lm_head": 0.02,
        "layers.moe.router": 0.02,
        "layers.self_attn.q_proj": 1 / math.sqrt(64),
        "layers.self_attn.o_proj": 1 / math.sqrt(8) / 2,  # fan in 8, residual writes 1 / sqrt(2 * 2 layers)
        "layers.moe.w1": 1 / math.sqrt(64),
        "layers.moe.w2": 1 / math.sqrt(48) / 2,
    }
    for name, std in wanted.items():
        assert abs(params[name].std() / std - 1) < 5 / math.sqrt(2 * params[name].numel()), name
    assert all((leaf == 1).all() for name, leaf in params.items() if name.endswith("norm"))
    assert not params["layers.moe.router_bias"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype_starts_from_the_same_draw(dtype: torch.dtype) -> None:
    wanted = flatten(init_params(TINY, seeded(0)))
    for name, leaf in flatten(init_params(TINY, seeded(0), dtype)).items():
        assert leaf.dtype == dtype
        assert_close(leaf, wanted[name], 1e-2 if dtype == torch.bfloat16 else 1e-6, name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda flat: flat.pop("norm"), r"params\.norm: expected shape \(8,\), got no such leaf"),
        (lambda flat: flat.update({"layers.extra": torch.ones(3)}), r"params\.layers\.extra: expected no such leaf"),
        (lambda flat: flat.update({"layers.moe.w2": torch.ones(2)}), r"params\.layers\.moe\.w2: .*, got \(2,\)"),
        (lambda flat: flat.update({"layers.moe.w2": torch.ones(99, 2)}), r"params\.layers\.moe\.w2: .*, got \(99, 2\)"),
    ],
    ids=["missing", "unknown", "too small", "too large"],
)
def test_foreign_parameters_are_refused_by_the_name_of_the_leaf(spoil: Any, said: str) -> None:
    flat = flatten(init_params(TINY, seeded(0)))
    spoil(flat)
    with pytest.raises(ValueError, match=said):
        check_params(unflatten(flat), TINY)


# ---- the small pieces ----------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 500), st.sampled_from([2, 4, 8]))
def test_rotated_products_depend_on_the_distance_of_positions_only(i: int, j: int, shift: int, dim: int) -> None:
    """float32 angles: cos of an angle near 500 is exact to about 3e-5."""
    q, k = normal(1, 1, 1, dim), normal(1, 1, 1, dim, seed=1)

    def product(at: int, other: int) -> Tensor:
        turned = (rotate(x, *rotary_angles(torch.tensor([p]), dim, 100.0)) for x, p in ((q, at), (k, other)))
        return (next(turned) * next(turned)).sum()

    assert abs(product(i, j) - product(i + shift, j + shift)) < 2e-4
    assert abs(rotate(q, *rotary_angles(torch.tensor([i]), dim, 100.0)).norm() - q.norm()) < 1e-5


def test_rotated_products_do_depend_on_the_distance_and_position_zero_is_left_alone() -> None:
    q, k = normal(1, 1, 1, 4), normal(1, 1, 1, 4, seed=1)
    products = [(rotate(q, *rotary_angles(torch.tensor([p]), 4, 100.0)) * k).sum().item() for p in range(8)]
    assert len({round(product, 3) for product in products}) == 8
    assert torch.equal(rotate(q, *rotary_angles(torch.tensor([0]), 4, 100.0)), q)


def test_rotation_turns_the_pairs_of_the_two_halves_by_their_angles() -> None:
    x, position, theta = normal(1, 1, 1, 6), 3, 50.0
    turned = rotate(x, *rotary_angles(torch.tensor([position]), 6, theta)).flatten().tolist()
    for pair in range(3):
        angle = position * theta ** (-2 * pair / 6)
        a, b = x.flatten()[pair].item(), x.flatten()[pair + 3].item()
        assert turned[pair] == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
        assert turned[pair + 3] == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


def test_norm_and_activation_are_their_formulas() -> None:
    x, up, weight = normal(3, 5), normal(3, 5, seed=1), normal(5, seed=2)
    assert_close(rms_norm(x, weight, 0.1), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight, 1e-14)
    assert_close(swiglu_reference(x, up), x / (1 + torch.exp(-x)) * up, 1e-14)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.25, torch.tensor(0.0), torch.tensor(2.0)], ids=str)
def test_scale_gradient_keeps_the_value_and_scales_the_gradient(scale: Any) -> None:
    x = normal(4).requires_grad_()
    scaled = scale_gradient(x, scale)
    assert torch.equal(scaled, x)
    if scaled.requires_grad:
        assert torch.equal(torch.autograd.grad(scaled.sum(), x)[0], torch.full_like(x, float(scale)))
    else:
        assert not isinstance(scale, Tensor)
        assert scale == 0


# ---- the decoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_and_decisions_are_float32_or_wider(dtype: torch.dtype, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    logits, trace = forward(init_params(config, seeded(0), dtype), tiny_batch().input_ids, config)
    wide = wide_dtype(dtype)
    assert wide == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (logits.dtype, trace.router_logits.dtype, trace.weights.dtype) == (wide, wide, wide)
    assert (trace.expert_ids.dtype, trace.active.dtype, trace.router_inputs.dtype) == (torch.int64, torch.bool, dtype)
    layers, tokens, slots = config.num_hidden_layers, 10, config.routes_per_token
    assert logits.shape == (2, 5, config.vocab_size)
    assert trace.router_inputs.shape == (layers, tokens, config.hidden_size)
    assert trace.router_logits.shape == (layers, tokens, config.num_experts)
    assert trace.expert_ids.shape == trace.weights.shape == trace.active.shape == (layers, tokens, slots)
    assert not trace.router_inputs.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_a_narrower_dtype_computes_the_same_logits_roughly(dtype: torch.dtype, tolerance: float) -> None:
    config = tiny_config(num_experts_per_tok=4)  # all experts: no decision that rounding could flip
    exact = forward(spread_params(config, dtype=torch.float64, router_gain=1.0), tiny_batch().input_ids, config)[0]
    logits = forward(spread_params(config, dtype=dtype, router_gain=1.0), tiny_batch().input_ids, config)[0]
    assert_close(logits, exact, tolerance)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.5, math.nan])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"surprise_budget: expected a number in \(0, 1\], got"):
        forward(init_params(TINY, seeded(0)), tiny_batch().input_ids, TINY, surprise_budget=budget)


def test_a_whole_number_is_as_good_as_a_float() -> None:
    params, ids = init_params(TINY, seeded(0)), tiny_batch().input_ids
    outputs = forward(params, ids, TINY, surprise_budget=1, router_coupling=1)
    assert_same_bits(outputs, forward(params, ids, TINY, surprise_budget=1.0, router_coupling=1.0))


def test_no_mask_is_a_mask_of_ones() -> None:
    params, ids = spread_params(TINY), tiny_batch().input_ids
    actual, wanted = (forward(params, ids, TINY, attention_mask=mask) for mask in (None, torch.ones_like(ids)))
    assert_same_bits(actual, wanted)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_no_position_sees_a_later_one(kv_heads: int) -> None:
    """By gradients: d logits[i] / d embedding[j] is exactly zero for j > i, and not for j <= i."""
    config = tiny_config(num_attention_heads=4, num_key_value_heads=kv_heads, tie_word_embeddings=False, vocab_size=5)
    params, ids = spread_params(config), torch.arange(5)[None]

    def row(embeddings: Tensor) -> Tensor:
        return forward({**params, "embed_tokens": embeddings}, ids, config)[0][0]

    jacobian = torch.autograd.functional.jacobian(row, params["embed_tokens"]).abs().sum(dim=(1, 3))
    assert not jacobian.triu(1).any()
    assert (jacobian.tril() > 0).sum() == 15


def test_padding_in_front_shifts_positions_and_changes_nothing() -> None:
    """The angles are float32: 1e-6 in float64."""
    params, batch = spread_params(TINY), tiny_batch()
    bare, _ = forward(params, batch.input_ids, TINY)
    noise = tiny_batch(seed=7).input_ids[:, :3]
    ids = torch.cat((noise, batch.input_ids), dim=1)
    mask = torch.cat((torch.zeros_like(noise), batch.attention_mask), dim=1)
    assert_close(forward(params, ids, TINY, attention_mask=mask)[0][:, 3:], bare, 1e-6)
