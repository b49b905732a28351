"""Our pure AdamW against torch's, the schedule against its formula, clipping, and the losses against torch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from tests.helpers import assert_close, seeded
from tiny_onn_func.tree import leaves, stack, tree_map, unstack
from training import HyperParams
from training.step.losses import language_modelling, predictive_integrity
from training.step.optim import AdamWState, adamw_init, adamw_update, clip_factor, global_norm, schedule
from training.step.router_loss import router_loss
from training.step.router_state import balanced_bias
from training.step.rules import Targets, router_targets


def drawn_tree(seed: int) -> dict:
    generator = seeded(seed)
    return {
        "w": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "in": {"norm": torch.randn(4, generator=generator, dtype=torch.float64)},
    }


@pytest.mark.parametrize("way", ["alone", "numbers as tensors", "mapped"])
def test_fifty_steps_equal_torch_adamw(way: str) -> None:
    """Alone, torch's fused kernel makes the step; a tensor among the numbers, or vmap, asks for the formula itself."""
    hyper = HyperParams(beta1=0.8, beta2=0.95, eps=1e-6)
    params, lr, decay = drawn_tree(0), 0.02, 0.3
    matrix, norm = (leaf.clone().requires_grad_() for leaf in leaves(params))
    groups = [{"params": [matrix], "weight_decay": decay}, {"params": [norm], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), eps=1e-6)
    if way != "alone":
        hyper = hyper._replace(beta1=torch.tensor(0.8, dtype=torch.float64))

    def update(params: dict, grads: dict, state: AdamWState) -> tuple[dict, AdamWState]:
        return adamw_update(params, grads, state, lr=lr, weight_decay=decay, hyper=hyper, grad_scale=2.0)

    ours, one_step = (params, adamw_init(params)), update
    if way == "mapped":
        ours, one_step = stack([ours] * 2), vmap(update, (0, None, 0))
    for step in range(50):
        grads = drawn_tree(step + 1)
        matrix.grad, norm.grad = (2 * leaf for leaf in leaves(grads))
        theirs.step()
        ours = one_step(ours[0], grads, ours[1])
    updated = (ours if way != "mapped" else unstack(ours)[1])[0]
    assert_close(updated["w"], matrix.detach(), 1e-12, "matrix")
    assert_close(updated["in"]["norm"], norm.detach(), 1e-12, "norm, which has no decay")


def test_an_update_leaves_its_inputs_alone() -> None:
    params, grads = drawn_tree(0), drawn_tree(1)
    state = adamw_init(params)
    before = [leaf.clone() for leaf in leaves((params, grads, state))]
    adamw_update(params, grads, state, lr=0.1, weight_decay=0.1, hyper=HyperParams())
    assert all(torch.equal(a, b) for a, b in zip(before, leaves((params, grads, state)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_go_by_their_names_in_whatever_order_they_come(dtype: torch.dtype) -> None:
    params, grads = ({name: drawn_tree(seed + at)["w"].to(dtype) for at, name in enumerate("ab")} for seed in (0, 2))
    turned = {name: grads[name] for name in "ba"}
    wanted, actual = (
        adamw_update(params, by_name, adamw_init(params), lr=0.1, weight_decay=0.1, hyper=HyperParams())
        for by_name in (grads, turned)
    )
    for ours, theirs in ((actual[0], wanted[0]), (actual[1].mu, wanted[1].mu), (actual[1].nu, wanted[1].nu)):
        assert all(torch.equal(ours[name], theirs[name]) for name in "ab")


def test_strides_change_nothing() -> None:
    """The fused kernel reads memory in order, whatever a view says of it."""
    params, grads = drawn_tree(0), drawn_tree(1)
    views = [{**tree, "w": tree["w"].T.contiguous().T} for tree in (params, grads)]
    wanted, _ = adamw_update(params, grads, adamw_init(params), lr=0.1, weight_decay=0.1, hyper=HyperParams())
    for mine, theirs in ((params, views[1]), (views[0], grads)):
        updated, _ = adamw_update(mine, theirs, adamw_init(mine), lr=0.1, weight_decay=0.1, hyper=HyperParams())
        assert torch.equal(updated["w"], wanted["w"])


def test_mapped_learning_rates_equal_single_runs() -> None:
    params, grads = drawn_tree(0), drawn_tree(1)
    rates = torch.tensor([0.0, 0.1], dtype=torch.float64)

    def update(lr: torch.Tensor) -> dict:
        return adamw_update(params, grads, adamw_init(params), lr=lr, weight_decay=0.1, hyper=HyperParams())[0]

    for run, rate in zip(unstack(vmap(update)(rates)), rates, strict=True):
        for mapped, single in zip(leaves(run), leaves(update(rate)), strict=True):
            assert_close(mapped, single, 1e-15)
    assert torch.equal(update(rates[0])["w"], params["w"])


def test_the_schedule_warms_up_to_the_peak_and_follows_the_cosine_to_its_floor() -> None:
    hyper = HyperParams(warmup_steps=10, total_steps=110, min_lr_ratio=0.1)
    shares = [float(schedule(torch.tensor(step), hyper)) for step in range(130)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares[110:] == pytest.approx([0.1] * 20)
    assert shares[35] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert float(schedule(torch.tensor(5000), HyperParams())) == 1.0


def test_wsd_warms_up_stays_at_the_peak_and_falls_in_a_line_to_its_floor() -> None:
    hyper = HyperParams(warmup_steps=10, total_steps=110, decay_steps=20, min_lr_ratio=0.1)
    shares = [float(schedule(torch.tensor(step), hyper)) for step in range(130)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10:91] == [1.0] * 81
    assert shares[91:110] == pytest.approx([1 - 0.9 * step / 20 for step in range(1, 20)])
    assert shares[110:] == pytest.approx([0.1] * 20)
    assert float(schedule(torch.tensor(5000), HyperParams(decay_steps=20))) == 1.0, "without an end there is no decay"
    overlapping = HyperParams(warmup_steps=10, total_steps=12, decay_steps=9)
    shares = [float(schedule(torch.tensor(step), overlapping)) for step in range(14)]
    assert shares == pytest.approx([*((step + 1) / 10 for step in range(10)), 1.0, 0.5, 0.0, 0.0])


def test_mapped_schedules_of_every_shape_are_those_of_the_runs_alone() -> None:
    """Cosine, wsd and constant rates side by side in one vmap."""
    columns = {"warmup_steps": [5, 0, 5, 0], "total_steps": [40, 40, 0, 40], "decay_steps": [0, 10, 10, 40]}
    mapped = {name: torch.tensor(column) for name, column in columns.items()}
    for step in map(torch.tensor, (0, 3, 20, 29, 30, 31, 39, 50)):
        rates = vmap(lambda numbers, at=step: schedule(at, HyperParams(min_lr_ratio=0.1)._replace(**numbers)))(mapped)
        for run in range(4):
            alone = {name: column[run] for name, column in columns.items()}
            assert float(rates[run]) == float(schedule(step, HyperParams(min_lr_ratio=0.1, **alone)))


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_clipping_brings_the_global_norm_to_the_limit_and_no_lower(limit: float, seed: int) -> None:
    grads = drawn_tree(seed)
    norm = global_norm(grads)
    assert float(norm) == pytest.approx(float(torch.cat([leaf.flatten() for leaf in leaves(grads)]).norm()))
    clipped = float(norm * clip_factor(norm, limit))
    assert clipped == pytest.approx(min(float(norm), limit), rel=1e-4)


def test_runs_in_front_have_each_its_own_norm() -> None:
    trees = [drawn_tree(seed) for seed in range(3)]
    norms = global_norm(stack(trees), 1)
    assert norms.tolist() == pytest.approx([float(global_norm(tree)) for tree in trees])
    assert global_norm(tree_map(lambda leaf: leaf.unflatten(0, (1, 3)), stack(trees)), 2).tolist() == [norms.tolist()]


def test_the_main_loss_is_torchs_cross_entropy() -> None:
    logits = torch.randn(3, 5, 7, generator=seeded(0), dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 5), generator=seeded(1))
    labels[0, 1] = labels[2] = -100
    lm = language_modelling(logits, labels)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(lm.loss_sum, wanted, 1e-12)
    assert int(lm.targets) == 9
    assert int(lm.correct) == int(((logits.argmax(-1) == labels) & (labels != -100)).sum())
    entropy = torch.distributions.Categorical(logits=logits).entropy()[labels != -100].sum()
    assert_close(lm.entropy_sum, entropy, 1e-12)


def test_no_target_at_all_gives_zero_and_no_nan() -> None:
    lm = language_modelling(torch.randn(2, 3, 5), torch.full((2, 3), -100))
    assert [float(value) for value in lm] == [0.0, 0.0, 0.0, 0.0]


INF = torch.inf
SURPRISES = torch.tensor([[[3.0, 1.0, INF], [2.0, 2.0, INF], [INF, 5.0, INF], [INF, INF, INF], [1.0, 2.0, 3.0]]])
REAL = torch.tensor([True, True, True, True, False])


def test_the_target_is_the_least_surprised_expert_of_informative_tokens() -> None:
    targets = router_targets(SURPRISES, REAL, min_candidates=2)
    assert targets.informative.tolist() == [[True, False, False, False, False]]
    assert targets.tied.tolist() == [[False, True, False, False, False]]
    assert int(targets.expert[0, 0]) == 1
    turned = router_targets(SURPRISES, REAL, 2, sign=-1.0)
    assert int(turned.expert[0, 0]) == 0
    assert turned.informative.tolist() == targets.informative.tolist()
    assert turned.tied.tolist() == targets.tied.tolist()


@pytest.mark.parametrize("enough", [0, 1])
def test_a_lone_candidate_teaches_only_where_one_is_enough_and_none_never_teaches(enough: int) -> None:
    targets = router_targets(SURPRISES, REAL, min_candidates=enough)
    assert targets.informative.tolist() == [[True, False, True, False, False]]
    assert int(targets.expert[0, 2]) == 1


def test_router_loss_terms_equal_their_formulas() -> None:
    generator = seeded(3)
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    real = torch.tensor([True, True, True, False])
    targets = Targets(
        torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]), real.expand(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    )
    load = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    hyper = HyperParams(surprise_weight=2.0, balance_weight=0.3, z_weight=0.1)
    loss = router_loss(logits, targets, load, real, hyper)
    kept = logits[:, :3]
    surprise = F.cross_entropy(kept.flatten(0, 1), targets.expert[:, :3].flatten())
    balance = 3 * (load * kept.softmax(-1).mean(1)).sum(-1).mean()
    z = kept.logsumexp(-1).square().mean()
    for term, wanted in zip(loss, (2 * surprise + 0.3 * balance + 0.1 * z, surprise, balance, z), strict=True):
        assert_close(term, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_the_shares_of_a_batchs_parts_in_the_routers_loss_add_up(dtype: torch.dtype, soft: bool) -> None:
    """With uneven parts: a token that teaches weighs the same in whichever it is."""
    logits = torch.randn(2, 3, 10, 4, generator=seeded(0), dtype=dtype)
    real = torch.rand(2, 10, generator=seeded(1)) < 0.8
    informative = (torch.rand(2, 3, 10, generator=seeded(2)) < 0.5) & real[:, None]
    shares = torch.rand(2, 3, 10, 4, generator=seeded(3), dtype=dtype).softmax(dim=-1) if soft else None
    targets = Targets(shares.argmax(-1) if soft else logits.argmin(-1), informative, ~informative, shares)
    load = torch.rand(2, 3, 4, generator=seeded(4), dtype=dtype)
    hyper = HyperParams(surprise_weight=2.0, balance_weight=0.3, z_weight=0.1)
    whole = router_loss(logits, targets, load, real, hyper)
    counts = {"informative": informative.sum(dim=(-2, -1)), "tokens": real.sum(dim=-1)}
    parts = []
    for span in (slice(0, 3), slice(3, 10)):
        own = Targets(*(None if t is None else t[:, :, span] for t in targets))
        parts.append(router_loss(logits[:, :, span], own, load, real[:, span], hyper, **counts))
    for name, ours, *theirs in zip(whole._fields, whole, *parts, strict=True):
        assert_close(sum(theirs), ours, 1e-6, name)


def test_an_even_load_has_a_balance_loss_of_one_and_a_collapsed_one_of_num_experts() -> None:
    targets = Targets(
        torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2).bool()
    )
    real = torch.ones(2, dtype=torch.bool)
    even = router_loss(torch.zeros(1, 2, 4), targets, torch.full((1, 4), 0.25), real, HyperParams())
    alone = torch.tensor([50.0, 0.0, 0.0, 0.0])
    collapsed = router_loss(alone.expand(1, 2, 4), targets, (alone > 0).float()[None], real, HyperParams())
    assert float(even.balance) == pytest.approx(1.0)
    assert float(collapsed.balance) == pytest.approx(4.0)
    assert float(even.surprise) == 0.0


def test_the_selection_bias_sinks_over_used_experts() -> None:
    rows = torch.tensor([[6, 3, 3, 0]])
    assert balanced_bias(torch.zeros(1, 4), rows, 0.1).tolist() == [[pytest.approx(-0.1), 0.0, 0.0, pytest.approx(0.1)]]


@given(st.integers(1, 7), st.integers(1, 10_000))
def test_an_exactly_fair_load_moves_no_bias(experts: int, rows: int) -> None:
    """Shares in float32 need not add up: 1 / 6 six times is above or below 1 by rounding."""
    bias = torch.linspace(-1, 1, experts)[None]
    assert torch.equal(balanced_bias(bias, torch.full((1, experts), rows), 0.1), bias)


def test_predictive_integrity_is_its_formula() -> None:
    integrity = predictive_integrity(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(3.0), 0.5, 0.1)
    assert float(integrity) == pytest.approx(math.exp(-0.5 * (2.0 / 4.0 + 0.1 * 3.0)))


def test_stacked_optimizer_states_unstack_to_themselves() -> None:
    states = [adamw_init(drawn_tree(seed)) for seed in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(leaves(unstack(stack(states))), leaves(states), strict=True))
