"""A hyper step is the one that its definitions describe: 500 random cases against loops in float64."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.training.step.reference_step import Result, reference_step
from tiny_onn_func import ModelConfig
from tiny_onn_func.config import HASH_KEYS, HASH_WEIGHTS
from tiny_onn_func.tree import flatten, tree_map
from training import Batch, HyperParams, TrainState, hyper_step, init_state, per_token_surprise

CASES, BLOCK = 500, 50
KINDS = ("w2", "unweighted", "experts", "input", "benefit")
ROUNDING = 1e-13
CLOSE = 1e-4  # a decision nearer than this may fall otherwise in float32, and everything after it


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Without the checks of annotations, which take most of a tiny step's time; other tests have them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class Case(NamedTuple):
    config: ModelConfig
    state: TrainState  # numbers that float32 holds, in float64
    batch: Batch
    hyper: HyperParams
    kind: str
    teacher: Tensor | None


def draw_config(rng: random.Random) -> ModelConfig:
    experts = rng.randint(2, 6)
    heads, kv_heads, head_dim = rng.choice([(1, 1, 4), (2, 1, 2), (2, 2, 4), (4, 2, 2), (3, 1, 2)])
    routing = rng.choice(["router"] * 4 + ["token", "hash", "hash", "thresholds"])
    least, most = rng.choice(
        [(1, None), (1, None), (2, None), (1, rng.randint(1, experts)), (2, rng.randint(2, experts))]
    )
    fixed = routing != "thresholds" and rng.random() < 0.3
    layers, hashed = rng.randint(1, 3), {}
    if routing == "hash":
        hashed = {"hash_key": rng.choice(HASH_KEYS), "hash_weights": rng.choice(HASH_WEIGHTS)}
        named = sorted(rng.sample(range(layers), rng.randint(1, layers)))
        hashed["hash_layers"] = rng.choice(["all", ",".join(map(str, named))])
    config = ModelConfig(
        vocab_size=rng.randint(5, 11),
        hidden_size=rng.randint(4, 8),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        moe_intermediate_size=rng.randint(2, 4),
        num_experts=experts,
        num_experts_per_tok=rng.randint(1, experts) if fixed else -1,
        min_experts_per_tok=1 if fixed else least,
        max_experts_per_tok=None if fixed else most,
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
        rope_theta=rng.choice([1e4, 50.0]),
        routing=routing,
        tie_word_embeddings=rng.random() < 0.5,
        **hashed,
    )
    own = random.Random(repr(config))  # a stream of its own, so that all else stays as it was
    if own.random() < 0.5:
        return config
    stable = {"routing": own.choice(("stable", "kmeans"))} if config.routing == "router" and own.random() < 0.3 else {}
    return replace(
        config,
        **stable,
        ngram_order=own.randint(1, 4),
        ngram_buckets=own.randint(1, 9),
        value_embeddings=own.random() < 0.4,
        token_bias=own.random() < 0.4,
        logit_softcap=own.choice([0.0, 0.0, 1.5]),
        default_outputs=own.random() < 0.3 and config.routing != "thresholds",
        gate="sigmoid" if own.random() < 0.4 and config.routing != "thresholds" else "softmax",
        shared_expert_intermediate_size=own.choice([0, 0, 3]),
    )


def draw_mask_row(rng: random.Random, length: int) -> list[int]:
    """One row: full, padded left, right, on both sides or whole, packed documents, or documents and padding at will."""
    left, right = rng.randint(0, length - 1), rng.randint(0, length - 1)
    kind = rng.choice(["full", "left", "right", "both", "packed", "any", "padding"])
    if kind == "packed":
        cuts = sorted(rng.sample(range(length), min(2, length)))
        return [1 + sum(i >= cut for cut in cuts) for i in range(length)]
    if kind == "any":
        return [rng.randint(0, 3) for _ in range(length)]
    first = left if kind in ("left", "both") else 0
    last = length - right if kind in ("right", "both") else length
    return [int(first <= i < last and kind != "padding") for i in range(length)]


def draw_batch(rng: random.Random, config: ModelConfig) -> Batch:
    rows, length = rng.randint(1, 3), rng.randint(2, 7)
    mask = [draw_mask_row(rng, length) for _ in range(rows)]
    gaps = rng.choice([0.0, 0.2, 0.6, 1.0] if rng.random() < 0.3 else [0.0, 0.2])
    tokens = [[rng.randrange(config.vocab_size) for _ in row] for row in mask]
    on_padding = rng.random() < 0.3  # where it is no target
    labels = [
        [rng.randrange(config.vocab_size) if (n or on_padding) and rng.random() >= gaps else -100 for n in row]
        for row in mask
    ]
    return Batch(torch.tensor(tokens), torch.tensor(labels), torch.tensor(mask))


def draw_hyper(rng: random.Random, config: ModelConfig) -> HyperParams:
    """Coefficients; each rule beyond the default is in a part of the cases, so that they meet each other."""

    def sometimes(share: float, *values: Any) -> Any:
        return rng.choice(values) if rng.random() < share else None

    drawn = {
        "lr": rng.uniform(1e-3, 3e-2),
        "router_lr": rng.choice([0.0, 1e-3, 2e-2]),
        "backbone_lr_scale": sometimes(0.3, 0.0, 0.4),
        "weight_decay": sometimes(0.5, 0.0, 0.5),
        "beta1": rng.choice([0.9, 0.7]),
        "beta2": rng.choice([0.99, 0.9]),
        "eps": rng.choice([1e-8, 1e-3, 1e-2]),
        "max_grad_norm": rng.choice([0.2, 1.0, 100.0]),
        "warmup_steps": sometimes(0.4, 1, 4, 20),
        "total_steps": sometimes(0.4, 4, 9, 30),
        "min_lr_ratio": sometimes(0.4, 0.1),
        "pi_alpha": rng.choice([0.1, 0.5, 0.8, 0.95, 1.0]),
        "pi_gamma": rng.choice([0.1, 0.7]),
        "min_candidates": sometimes(0.4, 1, 3),
        "surprise_weight": sometimes(0.3, 0.0, 0.3),
        "surprise_sign": sometimes(0.3, -1.0),
        "surprise_until": sometimes(0.3, 3, 12),
        "target_temperature": sometimes(0.3, 0.2, 1.5),
        "expert_norm": sometimes(0.3, 1.0, 0.5),
        "shuffle_targets": sometimes(0.2, 1),
        "balance_weight": sometimes(0.4, 0.01, 1.0),
        "z_weight": sometimes(0.3, 0.01, 0.3),
        "router_coupling": sometimes(0.4, 0.5, 1.0),
        "bias_speed": sometimes(0.3, 0.01),
        "explore_prob": sometimes(0.3, 0.3, 1.0),
        "explore_seed": rng.randrange(10),
        "freeze_step": sometimes(0.2, 3, 5),
        "regenerate_below": sometimes(0.3, 0.3, 0.7, 0.95),
    }
    if drawn["regenerate_below"]:  # it has to wait for 1 / (1 - beta2) steps
        drawn["beta2"] = rng.choice([0.5, 0.75])
    if (own := random.Random(drawn["lr"])).random() < 0.3:  # a stream of its own, so that all else stays as it was
        drawn["decay_steps"] = own.choice((1, 3))
    if own.random() < 0.25:
        drawn |= {"table_step": own.choice((0, 2, 5)), "table_memory": own.choice((0.99, 0.5))}
        drawn |= {"kmeans_rate": own.choice((0.01, 0.5)), "default_memory": own.choice((0.9, 0.5))}
        drawn |= {"quantile_balance": own.choice((1.0, 0.3)), "quantile_k": own.choice((0, 1, 1.7))}
    return HyperParams(**{name: value for name, value in drawn.items() if value is not None})


def draw_state(rng: random.Random, generator: torch.Generator, config: ModelConfig) -> TrainState:
    """A state on its way: parameters away from their initial symmetry, moments and biases that are not zero."""

    def noise(leaf: Tensor, size: float) -> Tensor:
        return size * torch.randn(leaf.shape, generator=generator)

    state = init_state(config, generator)
    state = state._replace(params=tree_map(lambda leaf: leaf + noise(leaf, 0.4), state.params))
    if rng.random() < 0.3:  # some without a selection bias
        moe = state.params["layers"]["moe"]
        moe["router_bias"] = torch.zeros_like(moe["router_bias"])
    if config.routing == "stable":  # counts are no less than 0
        moe = state.params["layers"]["moe"]
        moe["token_table"] = moe["token_table"].abs() * (moe["token_table"] > 0)
        moe["table_on"] = torch.full_like(moe["table_on"], rng.choice([0.0, 1.0]))
    step = rng.choice([0, 1, 3, 5, 8])
    if step:

        def used(opt: Any) -> Any:
            mu, nu = tree_map(lambda m: noise(m, 0.05), opt.mu), tree_map(lambda v: noise(v, 0.1) ** 2, opt.nu)
            return opt._replace(updates=torch.tensor(step), mu=mu, nu=nu)

        state = state._replace(expert_opt=used(state.expert_opt), router_opt=used(state.router_opt))
    return cast(state._replace(step=torch.tensor(step)), torch.float64)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def draw_case(seed: int) -> Case:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config = draw_config(rng)
    batch, hyper = draw_batch(rng, config), draw_hyper(rng, config)
    teacher = None
    if rng.random() < 0.25:
        teacher = torch.randn(*batch.labels.shape, config.vocab_size, generator=generator)
        hyper = hyper._replace(distill_alpha=rng.choice([0.3, 1.0]), distill_temperature=rng.choice([1.0, 1.7]))
    kind = "oracle" if rng.random() < 0.03 else rng.choice(KINDS)
    return Case(config, draw_state(rng, generator, config), batch, hyper, kind, teacher)


def differences(case: Case, dtype: torch.dtype, as_tensors: bool, expected: Result) -> list[str]:
    """What the program computes otherwise than the reference: name, value, expected value."""
    config, state, batch, hyper, kind, teacher = case
    if as_tensors:  # a coefficient may be a 0-d tensor; then a term of weight 0 is computed, and changes nothing
        hyper = HyperParams(*(torch.tensor(x, dtype=dtype if isinstance(x, float) else None) for x in hyper))
    state, teacher = cast(state, dtype), None if teacher is None else teacher.to(dtype)
    new, metrics = hyper_step(state, batch, hyper, config, kind=kind, teacher_logits=teacher)
    float64 = dtype == torch.float64
    tolerance, wrong = 1e-7 if float64 else 2e-3, []

    def compare(name: str, value: Tensor, other: Any, tolerance: float, size: float) -> None:
        other = torch.as_tensor(other, dtype=torch.float64)
        size = max(size, float(other.abs().max()))
        if not float((value.double() - other).abs().max()) <= tolerance * size:
            wrong.append(f"{name}: {value.flatten().tolist()[:6]}, expected {other.flatten().tolist()[:6]}")

    # In float32 AdamW divides the rounding of a gradient by eps where the gradient is about zero
    if float64 or hyper.eps >= 1e-3:
        for name, leaf in flatten(new.params).items():
            compare(name, leaf, expected.params[name], tolerance, 0)
    # A leaf whose gradient cancels to zero has the rounding of what cancels, and that of the other leaves
    least = {
        moment: max(floor, *(1e-3 * float(leaf.abs().max()) for leaf in leaves.values()))
        for moment, floor, leaves in zip(("mu", "nu"), (1e-5, 1e-9), expected.expert_moments, strict=True)
    }
    for opt, moments in ((new.expert_opt, expected.expert_moments), (new.router_opt, expected.router_moments)):
        for moment, leaves, others in zip(("mu", "nu"), (opt.mu, opt.nu), moments, strict=True):
            for name, leaf in flatten(leaves).items():
                compare(f"{moment} of {name}", leaf, others[name], tolerance, least[moment])
    spread = max((abs(v) for v in expected.surprise.values()), default=0.0)  # values of `benefit` cancel in a mean
    for name, value in metrics._asdict().items():
        size = spread * ("surprise" in name) + 1e-3
        compare(f"metrics.{name}", value, expected.metrics[name], tolerance, size)
    return wrong


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_hyper_step_equals_its_definition(first: int) -> None:
    """In float64 to 1e-7 of each leaf's largest entry (metrics too), in float32 to 2e-3.

    A case in which a decision is close (an argmin, a rank, a sign) is compared in float64 alone, and not at all where
    it is a tie but for rounding (an expert that one token visits has that token's value as its mean).
    """
    wrong, compared = [], 0
    for seed in range(first, first + BLOCK):
        case = draw_case(seed)
        expected = reference_step(case.state, case.batch, case.hyper, case.config, case.kind, case.teacher)
        errors = {}
        if expected.margin > ROUNDING:
            errors[torch.float64] = differences(case, torch.float64, seed % 4 == 0, expected)
        if expected.margin > CLOSE:
            errors[torch.float32] = differences(case, torch.float32, seed % 4 == 1, expected)
            compared += 1
        wrong += [f"seed {seed}, {dtype}, {line}" for dtype, lines in errors.items() for line in lines[:3]]
    assert not wrong, "\n".join(wrong)
    assert compared > BLOCK / 2, f"expected most cases to be far from any close decision, got {compared} of {BLOCK}"


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_surprise_equals_the_gradient_in_private_weights(first: int) -> None:
    """Of every routed (layer, token, expert), by every kind, +inf elsewhere; without exploration, at step 0."""
    for seed in range(first, first + BLOCK, 10):
        config, state, batch, hyper, kind, _ = draw_case(seed)
        state, hyper = state._replace(step=torch.tensor(0)), hyper._replace(distill_alpha=0.0, explore_prob=0.0)
        expected = torch.full((config.num_hidden_layers, batch.labels.numel(), config.num_experts), torch.inf).double()
        for place, value in reference_step(state, batch, hyper, config, kind).surprise.items():
            expected[place] = value
        surprise = per_token_surprise(state.params, batch, config, hyper, kind=kind)
        torch.testing.assert_close(
            surprise, expected, rtol=1e-7, atol=1e-12, msg=lambda text, seed=seed: f"seed {seed}: {text}"
        )


def test_the_oracle_explores_as_the_step_does() -> None:
    """Both are rare among the drawn cases, and a model of one layer cannot tell: the token is sent elsewhere there."""
    compared = 0
    for seed in range(60):
        case = draw_case(seed)
        if case.config.num_hidden_layers < 2 or case.config.num_experts < 3 or compared == 10:
            continue
        case = case._replace(kind="oracle", hyper=case.hyper._replace(explore_prob=1.0))
        expected = reference_step(case.state, case.batch, case.hyper, case.config, case.kind, case.teacher)
        wrong = differences(case, torch.float64, False, expected)
        assert not wrong, f"seed {seed}: {wrong[:3]}"
        compared += 1
    assert compared == 10
