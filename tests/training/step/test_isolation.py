"""Two systems that do not touch each other, and a step that leaves nothing behind."""

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.func import grad, grad_and_value, vmap

from tests.helpers import (
    Case,
    as_bits,
    assert_close,
    assert_same_bits,
    cases,
    real_tokens,
    seeded,
    spread_params,
    tiny_batch,
    tiny_config,
)
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.experts import Rows
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.tree import flatten, leaves, partition, stack, tree_map
from training import Batch, HyperParams, SurpriseHookManager, TrainState, hyper_step, init_state, per_token_surprise
from training.step.main_pass import main_gradients
from training.step.metrics import shares
from training.step.optim import adamw_init
from training.step.router_loss import router_loss
from training.step.rules import Targets, router_targets
from training.step.sums import routed_rows
from training.step.surprise import HookPoint

Params = dict[str, Any]
IS_ROUTER = ("layers.moe.router", "layers.moe.router_bias")


def situation(**sizes: Any) -> Case:
    config = tiny_config(**sizes)
    batch = tiny_batch(config, 3, 6, left=(0, 2), right=(0, 1, 3), unlabelled=0.3)
    return Case(config, spread_params(config, 1), batch, HyperParams())


def state_of(params: Params) -> TrainState:
    """A state at step 0 with parameters of one's own."""
    fast, _ = partition(params)
    learned = {"router": params["layers"]["moe"]["router"]}
    return TrainState(params, adamw_init(fast), adamw_init(learned), torch.zeros((), dtype=torch.int64))


def run_forward(params: Params, case: Case, coupling: float | Tensor = 0.0) -> tuple[Tensor, RouterTrace]:
    return forward(
        params,
        case.batch.input_ids,
        case.config,
        attention_mask=case.batch.attention_mask,
        surprise_budget=case.hyper.pi_alpha,
        router_coupling=coupling,
    )


def main_loss(params: Params, case: Case, coupling: float | Tensor = 0.0) -> Tensor:
    logits, _ = run_forward(params, case, coupling)
    return F.cross_entropy(logits.flatten(0, 1), case.batch.labels.flatten(), ignore_index=-100, reduction="sum")


def targets_of(case: Case) -> Targets:
    surprise = per_token_surprise(case.params, case.batch, case.config, case.hyper)
    return router_targets(surprise, real_tokens(case.batch), case.hyper.min_candidates, case.hyper.surprise_sign)


def loss_of_router(params: Params, case: Case, targets: Targets, coupling: float = 0.0) -> Tensor:
    """All terms of the router's loss as a function of every parameter."""
    _, trace = run_forward(params, case, coupling)
    load = shares(routed_rows(trace.expert_ids, trace.active, case.config.num_experts), trace.router_logits.dtype)
    hyper = case.hyper._replace(balance_weight=0.5, z_weight=0.1)
    return router_loss(trace.router_logits, targets, load, real_tokens(case.batch), hyper).total


def moved(grads: Params) -> set[str]:
    """Names of the leaves whose gradient has a bit set."""
    return {name for name, leaf in flatten(grads).items() if as_bits(leaf).any()}


# --- isolation --------------------------------------------------------------------------------------------------------


@given(cases())
def test_the_main_loss_gives_the_router_exactly_zero(case: Case) -> None:
    assert not moved(grad(main_loss)(case.params, case)) & set(IS_ROUTER)


def test_the_main_loss_moves_everything_but_the_router() -> None:
    case = situation(tie_word_embeddings=False)
    assert moved(grad(main_loss)(case.params, case)) == set(flatten(case.params)) - set(IS_ROUTER)


def test_with_coupling_the_main_loss_does_reach_the_router() -> None:
    """Negative twin: the zeros above are a property of the coupling, not of a dead path."""
    case = situation(num_experts_per_tok=2)  # a lone expert has weight 1 whatever the router says
    full = grad(main_loss)(case.params, case, 1.0)["layers"]["moe"]["router"]
    assert all(layer.abs().max() > 1e-4 for layer in full)
    half = grad(main_loss)(case.params, case, torch.tensor(0.5))["layers"]["moe"]["router"]
    assert_close(half[-1], full[-1] / 2, 1e-10, "half of the coupling, in the last layer")


def test_a_mapped_coupling_of_zero_isolates_as_the_number_zero_does() -> None:
    case = situation()
    off = flatten(grad(main_loss)(case.params, case, 0.0))
    zero = flatten(grad(main_loss)(case.params, case, torch.tensor(0.0)))
    for name, leaf in zero.items():
        assert (leaf == 0).all() if name in IS_ROUTER else True, name
        assert_close(leaf, off[name], 1e-12, name)


@given(cases())
def test_the_router_loss_gives_all_others_exactly_zero(case: Case) -> None:
    grads = grad(loss_of_router)(case.params, case, targets_of(case))
    assert moved(grads) <= {"layers.moe.router"}


def test_the_router_loss_moves_the_router_of_every_layer() -> None:
    case = situation()
    grads = grad(loss_of_router)(case.params, case, targets_of(case))
    assert moved(grads) == {"layers.moe.router"}
    assert all(layer.abs().max() > 1e-4 for layer in grads["layers"]["moe"]["router"])


def test_with_coupling_the_router_loss_does_reach_the_others() -> None:
    """Negative twin."""
    case = situation()
    assert "embed_tokens" in moved(grad(loss_of_router)(case.params, case, targets_of(case), 1.0))


def reported_and_wanted(coupling: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(grad_norm, router_grad_norm) of a step, and the norms of autograd's gradients of the two losses."""
    case = situation(num_experts_per_tok=2)
    case = case._replace(hyper=case.hyper._replace(router_coupling=coupling, balance_weight=0.5, z_weight=0.1))
    _, metrics = hyper_step(state_of(case.params), case.batch, case.hyper, case.config)
    count = (case.batch.labels != -100).sum()
    main = flatten(grad(main_loss)(case.params, case, coupling))
    own = grad(loss_of_router)(case.params, case, targets_of(case))["layers"]["moe"]["router"]
    fast = torch.cat([leaf.flatten() for name, leaf in main.items() if name not in IS_ROUTER]) / count
    router = own + main["layers.moe.router"] / count
    return (metrics.grad_norm, metrics.router_grad_norm), (fast.norm(), router.norm())


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_the_step_descends_the_gradients_of_these_two_losses(coupling: float) -> None:
    (main, router), (main_wanted, router_wanted) = reported_and_wanted(coupling)
    assert_close(main, main_wanted, 1e-10, "grad_norm")
    assert_close(router, router_wanted, 1e-10, "router_grad_norm")


# --- a step is a value ------------------------------------------------------------------------------------------------

VARIANTS = {
    "default": HyperParams(),
    "everything on": HyperParams(
        balance_weight=0.1, z_weight=0.1, router_coupling=0.5, bias_speed=0.1, explore_prob=0.5, explore_seed=3,
        warmup_steps=3, total_steps=9, surprise_sign=-1.0,
    ),
    "coefficients as tensors": HyperParams(lr=torch.tensor(1e-2), router_coupling=torch.tensor(0.0)),
}  # fmt: skip


def cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_leaves_its_inputs_untouched_and_keeps_structure_shapes_and_dtypes(
    variant: str, dtype: torch.dtype
) -> None:
    case, hyper = situation(), VARIANTS[variant]
    state = state_of(tree_map(lambda leaf: leaf.to(dtype), case.params))
    state, _ = hyper_step(state, case.batch, hyper, case.config)  # moments are no longer zero
    before = cloned((state, case.batch, hyper))
    after, metrics = hyper_step(state, case.batch, hyper, case.config)
    assert_same_bits((state, case.batch), before[:2], "inputs")
    assert_same_bits(tree_map(torch.zeros_like, after), tree_map(torch.zeros_like, state), "structure")
    assert after.step == state.step + 1
    changed = [
        name for name, leaf in flatten(after.params).items() if not torch.equal(leaf, flatten(state.params)[name])
    ]
    assert "layers.moe.w2" in changed
    assert "layers.moe.router" in changed
    for leaf in leaves((after, metrics)):
        assert leaf.grad_fn is None
        assert not leaf.requires_grad
        assert leaf.isfinite().all()


def a_step(**hyper: Any) -> tuple[TrainState, Any]:
    """The step that must come out the same every time; float32, where a kernel's choice would show."""
    config = tiny_config(moe_intermediate_size=8)
    batch = tiny_batch(config, 3, 6, left=(0, 2), right=(0, 1, 3))
    return hyper_step(init_state(config, seeded(0)), batch, HyperParams(explore_prob=0.3, **hyper), config)


def test_a_step_is_bitwise_repeatable() -> None:
    assert_same_bits(a_step(), a_step(), "step")


def test_a_step_does_not_depend_on_what_ran_before_it() -> None:
    """Other models, a step that failed half way, other seeds, modes of autograd."""
    wanted = a_step()
    case = situation(num_experts=3, num_hidden_layers=1)
    vmap(lambda p: main_loss(p, case))(stack([case.params, case.params]))
    main_loss(tree_map(lambda leaf: leaf.clone().requires_grad_(), case.params), case).backward()
    with pytest.raises(ValueError, match="pi_alpha"):
        a_step(pi_alpha=7.0)
    with pytest.raises(IndexError, match="out of bounds"):
        main_loss(case.params, case._replace(batch=case.batch._replace(labels=case.batch.labels.clamp_min(0) + 99)))
    torch.manual_seed(9)
    random.seed(9)
    assert_same_bits(a_step(), wanted, "later")
    with torch.no_grad():
        assert_same_bits(a_step(), wanted, "under no_grad")


def test_a_step_draws_nothing_from_torchs_global_generator() -> None:
    """Python's own generator is not looked at: the run-time type checker of the tests draws from it."""
    before = torch.get_rng_state()
    a_step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_is_the_same_with_and_without_torch_func() -> None:
    """Parameters that require grad send the step through torch.func; without them plain autograd does the work.

    Not the same bits: backward formulas differ in the last place where the gradient has a graph itself.
    """
    case = situation()
    plain, _ = main_gradients(*partition(case.params), case.batch, case.hyper, case.config, torch.tensor(0))
    followed = tree_map(lambda leaf: leaf.clone().requires_grad_(), case.params)
    functional, _ = main_gradients(*partition(followed), case.batch, case.hyper, case.config, torch.tensor(0))
    for name, leaf in flatten(plain[0]).items():
        assert_close(flatten(functional[0])[name].detach(), leaf, 1e-12, name)


# --- nothing is left behind -------------------------------------------------------------------------------------------

SMALL = dict(num_hidden_layers=2, num_experts=2, hidden_size=4, moe_intermediate_size=4, vocab_size=5)


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    """Only what reference counts free is freed: a cycle stays and is counted."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def live() -> int:
    """Tensors, and nodes of graphs that are written in Python."""
    kinds = Counter(map(type, gc.get_objects()))
    return sum(count for kind, count in kinds.items() if issubclass(kind, Tensor | BackwardCFunction))


def live_counts(step: Callable[[TrainState], TrainState], state: TrainState, steps: int) -> list[int]:
    """What lives after three steps (caches are warm), after a fifth of the others, two fifths, ..."""
    counts = []
    with no_garbage_collector():
        for index in range(3 + steps):
            state = step(state)
            if index == 2 or (index > 2 and (index - 2) % (steps // 5) == 0):
                counts.append(live())
    return counts


def small_problem() -> tuple[ModelConfig, Batch]:
    config = tiny_config(**SMALL)
    return config, tiny_batch(config, 1, 3)


def check_nothing_left(steps: int) -> None:
    config, batch = small_problem()
    counts = live_counts(lambda s: hyper_step(s, batch, HyperParams(), config)[0], init_state(config, seeded(0)), steps)
    assert len(counts) == 6
    assert set(counts) == {counts[0]}, f"live tensors and graph nodes every {steps // 5} steps: {counts}"


def check_nothing_left_under_vmap(steps: int) -> None:
    config, batch = small_problem()
    both = stack([init_state(config, seeded(seed)) for seed in (0, 1)])
    counts = live_counts(vmap(lambda s: hyper_step(s, batch, HyperParams(), config)[0]), both, steps)
    assert set(counts) == {counts[0]}, f"live tensors and graph nodes every {steps // 5} steps: {counts}"


def test_fifty_steps_leave_no_tensor_and_no_graph_behind() -> None:
    check_nothing_left(50)


def test_ten_mapped_steps_leave_no_tensor_and_no_graph_behind() -> None:
    check_nothing_left_under_vmap(10)


@pytest.mark.slow
def test_a_thousand_steps_leave_no_tensor_and_no_graph_behind() -> None:
    check_nothing_left(1000)


@pytest.mark.slow
def test_a_thousand_mapped_steps_leave_no_tensor_and_no_graph_behind() -> None:
    check_nothing_left_under_vmap(1000)


class Undetached(SurpriseHookManager):
    """What the hook manager must not do: keep the gradient attached to its graph."""

    def _hook(self, layer: int, point: HookPoint, tensors: tuple[Tensor, ...], saved: Tensor, rows: Rows) -> None:
        for t in tensors:
            self._handles.append(t.register_hook(lambda grad: self._record(layer, point, grad)))
            self._saved[point.place, layer] = saved.detach(), rows


@pytest.mark.parametrize(("manager", "leaks"), [(SurpriseHookManager, False), (Undetached, True)])
def test_an_undetached_hook_would_leave_its_graph_behind(manager: type[SurpriseHookManager], leaks: bool) -> None:
    """Negative twin: under torch.func the gradient has a graph; graph -> hook -> surprise -> graph is a cycle."""
    config, batch = small_problem()

    def objective(params: Params) -> tuple[Tensor, Tensor]:
        leaf = params["embed_tokens"]
        surprise = leaf.detach().new_full((config.num_hidden_layers, batch.input_ids.numel(), 2), torch.inf)
        hooks = manager(surprise)
        logits, _ = forward(params, batch.input_ids, config, apply_w2=hooks.apply_w2)
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"), surprise

    def step(state: TrainState) -> TrainState:
        grad_and_value(objective, has_aux=True)(state.params)
        return state

    counts = live_counts(step, init_state(config, seeded(0)), 10)
    if leaks:
        assert all(later > earlier for earlier, later in pairwise(counts)), counts
    else:
        assert set(counts) == {counts[0]}, counts


def test_a_step_keeps_no_reference_to_its_inputs() -> None:
    config, batch = small_problem()
    with no_garbage_collector():
        state = init_state(config, seeded(0))
        batch = cloned(batch)
        known = [weakref.ref(leaf) for leaf in leaves((state, batch))]
        after = hyper_step(state, batch, HyperParams(), config)
        del state, batch
        assert not [ref() for ref in known if ref() is not None]
        assert after
