"""torch.func over all of it: vmapped runs against the same runs alone, and gradients through a hyper step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._C import _functorch as functorch
from torch.func import grad, jvp, vmap

from tests.helpers import Case, assert_close, cases, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.primitives.vmap import each_run, outside_vmap, outside_vmap_tree, rewrap, unwrap
from tiny_onn_func.routing import route
from tiny_onn_func.tree import partition, stack, tree_map, unstack, walk
from training import Batch, HyperParams, TrainState, hyper_step, per_token_surprise
from training.step.counter_rng import random_exploration
from training.step.optim import adamw_init

# Mapped runs multiply matrices in another order. AdamW divides by sqrt(nu) + eps, so eps is kept well above that noise.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
EPS = 1e-3


def state_of(params: Any) -> TrainState:
    """A fresh state around parameters of any dtype."""
    fast, router = partition(params)
    learned = {"router": router["layers"]["moe"]["router"]}
    return TrainState(params, adamw_init(fast), adamw_init(learned), torch.zeros((), dtype=torch.int64))


def states(config: ModelConfig, runs: int, dtype: torch.dtype = torch.float64) -> list[TrainState]:
    """Different parameters, unevenly routed; run r has made r steps already."""
    every = []
    for run in range(runs):
        state = state_of(spread_params(config, run, dtype, router_gain=20.0))
        for step in range(run):
            state, _ = hyper_step(state, tiny_batch(config, seed=50 + step), HyperParams(eps=EPS), config)
        every.append(state)
    return every


def hypers(runs: int, dtype: torch.dtype = torch.float64) -> list[HyperParams]:
    """Runs that differ in every coefficient, all of them switched on."""

    def of(run: int) -> dict[str, float]:
        return dict(
            lr=1e-2 / (run + 1), router_lr=3e-2 / (run + 2), weight_decay=0.1 * run, beta1=0.9 - 0.1 * run,
            beta2=0.99 - 0.05 * run, eps=EPS * (run + 1), max_grad_norm=0.1 + run, warmup_steps=1 + run,
            total_steps=9 + run, decay_steps=3 * run, min_lr_ratio=0.1 * run, pi_gamma=0.1 * run,
            pi_alpha=(0.4, 0.9, 1.0)[run],
            min_candidates=(2, 1, 3)[run], surprise_weight=1.0 + run, surprise_sign=(1.0, -1.0, 1.0)[run],
            balance_weight=0.1 * run, z_weight=0.01 * (run + 1), router_coupling=0.3 * run, bias_speed=0.01 * run,
            explore_prob=0.2 * run, explore_seed=run, surprise_until=3 * run, target_temperature=0.5 * run,
            expert_norm=0.4 * run, shuffle_targets=(0, 0, 1)[run], freeze_step=(0, 0, 9)[run],
            regenerate_below=0.2 * run, backbone_lr_scale=1.0 - 0.3 * run, distill_alpha=0.2 * run,
            distill_temperature=1.0 + run, quantile_balance=0.1 * run, quantile_k=1.0 + run, table_step=5 + run,
            table_memory=0.9 - 0.1 * run, kmeans_rate=0.1 + 0.1 * run, default_memory=0.9 - 0.1 * run,
        )  # fmt: skip

    return [HyperParams(**{k: torch.tensor(v, dtype=dtype) for k, v in of(run).items()}) for run in range(runs)]


def assert_same_runs(actual: Any, alone: list[Any], tolerance: float) -> None:
    """Every leaf of every run: structure, dtype, and value relative to the largest entry or 1."""
    wanted = dict(walk(stack(alone)))
    ours = dict(walk(actual))
    assert list(ours) == list(wanted)
    for name, leaf in wanted.items():
        came = ours[name]
        assert (came.shape, came.dtype) == (leaf.shape, leaf.dtype), name
        assert torch.equal(came.isfinite(), leaf.isfinite()), name
        if leaf.dtype == torch.bool:
            assert torch.equal(came, leaf), name
            continue
        kept = leaf.isfinite()
        scale = leaf[kept].abs().amax().clamp_min(1.0) if kept.any() else 1.0
        error = float(((came - leaf)[kept].abs() / scale).amax()) if kept.any() else 0.0
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.0e}"


def test_the_hypers_of_these_tests_differ_in_every_coefficient() -> None:
    first, *_, last = hypers(3)
    assert all(getattr(first, name) != getattr(last, name) for name in set(first._fields) - {"surprise_sign"})
    assert set(HyperParams._fields) == set(first._fields)


CONFIGS = {
    "dynamic K": tiny_config(),
    "capped K": tiny_config(max_experts_per_tok=3, min_experts_per_tok=2),
    "fixed K": tiny_config(num_experts_per_tok=2, tie_word_embeddings=False),
    "one expert": tiny_config(num_experts=1, num_hidden_layers=1),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


# ---- through vmap's wrappers ---------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (2, 1), (0, 1)])
def test_what_is_peeled_is_wrapped_again_whatever_axes_are_mapped(dims: tuple[int, int]) -> None:
    x, shapes = drawn(2, 3, 4), []

    def again(t: Tensor) -> Tensor:
        plain, axes = unwrap(t)
        shapes.append((plain.shape, len(axes)))
        return rewrap(2 * plain, axes) - t

    outer, inner = dims
    out = vmap(vmap(again, inner, inner), outer, outer)(x)
    assert torch.equal(out, x)
    assert shapes == [((2, 3, 4), 2)]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_runs_of_nested_vmaps_lie_in_front_those_of_the_outer_first(order: tuple[int, int, int]) -> None:
    """One input is mapped by both vmaps, its axes anywhere; one by each; one by none; one is no tensor."""
    both, of_outer, of_inner, of_none = drawn(2, 3, 5), drawn(2, 5, seed=1), drawn(3, 5, seed=2), drawn(5, seed=3)
    calls: list[Any] = []

    def plain(*args: Any) -> tuple[Tensor, ...]:
        calls.append(([tuple(t.shape) for t in args[:-1]], functorch.get_interpreter_stack()))
        a, b, c, d, number = args
        return a + 10 * b + 100 * c + 1000 * d + number, a.sum(dim=-1)

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return outside_vmap(plain, a, b, c, of_none, 7)

    outer, inner = order.index(0), order.index(1) - (order.index(1) > order.index(0))
    nested = vmap(vmap(function, (inner, None, 0)), (outer, 0, None))
    out = nested(both.permute(order), of_outer, of_inner)
    assert torch.equal(out[0], both + 10 * of_outer[:, None] + 100 * of_inner + 1000 * of_none + 7)
    assert torch.equal(out[1], both.sum(dim=-1))
    assert calls[0][0] == [(6, 5)] * 4
    assert not calls[0][1], "it runs outside of the vmaps"


def test_what_somebody_differentiates_is_left_to_the_transforms() -> None:
    shapes = []

    def cube(t: Tensor) -> tuple[Tensor]:
        shapes.append(tuple(t.shape))
        return (t**3,)

    x = drawn(4, 3)
    for function in (
        lambda x: vmap(grad(lambda t: outside_vmap(cube, t)[0].sum()))(x),
        grad(lambda x: vmap(lambda t: outside_vmap(cube, t)[0])(x).sum()),
    ):
        torch.testing.assert_close(function(x), 3 * x**2)
    assert shapes == [(3,), (3,)]


class Pair(NamedTuple):
    first: Any
    second: Any


def test_a_tree_of_runs_gives_another_tree() -> None:
    def function(tree: Any) -> Any:
        a, rest = tree
        assert a.ndim == rest["b"].ndim == 1 + (a.shape[0] == 6)
        return {"sums": [a + rest["b"] * rest["number"]], "pair": Pair(a.sum(dim=-1), {"b": 2 * rest["b"]})}

    a, b = drawn(2, 3, 5), drawn(3, 5, seed=1)

    def of_one(a: Tensor, b: Tensor) -> Any:
        return outside_vmap_tree(function, (a, {"b": b, "number": 3}))

    out = vmap(vmap(of_one), (0, None))(a, b)
    assert torch.equal(out["sums"][0], a + 3 * b)
    assert torch.equal(out["pair"].first, a.sum(dim=-1))
    assert torch.equal(out["pair"].second["b"], 2 * b.expand(2, 3, 5))
    assert torch.equal(of_one(a[0, 0], b[0])["sums"][0], a[0, 0] + 3 * b[0])


def test_each_run_of_several_axes_is_one_call_with_the_tensors_of_that_run() -> None:
    x, y = drawn(2, 3, 4, 5), drawn(2, 3, seed=1)

    def of_one(tree: Any) -> Tensor:
        x, rest = tree
        assert (tuple(x.shape), rest["y"].ndim, rest["name"]) == ((4, 5), 0, "same")
        return (x * rest["y"]).sum(dim=0)

    tree = x, {"y": y, "name": "same"}
    assert torch.equal(each_run(of_one, tree, 2), (x * y[..., None, None]).sum(dim=2))
    assert torch.equal(each_run(of_one, (x[0, 0], {"y": y[0, 0], "name": "same"}), 0), (x[0, 0] * y[0, 0]).sum(dim=0))


# ---- vmapped runs == the same runs alone ---------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mapped_runs_equal_the_same_runs_alone_in_every_leaf_and_metric(kind: str, dtype: torch.dtype) -> None:
    config, batch = CONFIGS[kind], tiny_batch(CONFIGS[kind], right=(2, 0), unlabelled=0.2)
    runs, numbers = states(config, 3, dtype), hypers(3, dtype)
    mapped = stack(runs)
    for _ in range(2):
        mapped, metrics = vmap(lambda s, h: hyper_step(s, batch, h, config))(mapped, stack(numbers))
        stepped = [hyper_step(s, batch, h, config) for s, h in zip(runs, numbers, strict=True)]
        runs = [state for state, _ in stepped]
        assert_same_runs(mapped, runs, TOLERANCE[dtype])
        assert_same_runs(metrics, [m for _, m in stepped], TOLERANCE[dtype])


@KINDS
def test_python_numbers_and_tensors_are_the_same_hypers(kind: str) -> None:
    config, batch = CONFIGS[kind], tiny_batch(CONFIGS[kind])
    teacher = torch.randn(*batch.input_ids.shape, config.vocab_size, generator=seeded(0), dtype=torch.float64)
    for state, hyper in zip(states(config, 3), hypers(3), strict=True):
        numbers = HyperParams(*(value.item() for value in hyper))
        taught = teacher if numbers.distill_alpha else None  # the Python number 0 does not look at it
        (after, metrics), (wanted, ought) = (
            hyper_step(state, batch, h, config, teacher_logits=taught) for h in (hyper, numbers)
        )
        metrics = metrics._replace(lr=metrics.lr.to(ought.lr.dtype))  # a number has no dtype to ask for
        assert_same_runs(stack([after]), [wanted], 1e-6)  # the schedule is float32
        assert_same_runs(stack([metrics]), [ought], 1e-6)


@pytest.mark.parametrize("batch_mapped", [True, False], ids=["batch mapped", "batch shared"])
@pytest.mark.parametrize("hyper_mapped", [True, False], ids=["hyper mapped", "hyper shared"])
@pytest.mark.parametrize("state_mapped", [True, False], ids=["state mapped", "state shared"])
def test_any_of_state_batch_and_hyper_may_be_mapped(state_mapped: bool, hyper_mapped: bool, batch_mapped: bool) -> None:
    config = CONFIGS["dynamic K"]
    dims = tuple(0 if mapped else None for mapped in (state_mapped, batch_mapped, hyper_mapped))
    if dims == (None, None, None):
        return
    batches = [tiny_batch(config, seed=run, right=(run,)) for run in range(3)]
    inputs = (states(config, 3), batches, hypers(3))
    mapped = [stack(runs) if dim == 0 else runs[1] for runs, dim in zip(inputs, dims, strict=True)]
    together = vmap(lambda s, b, h: hyper_step(s, b, h, config), in_dims=dims)(*mapped)
    picked = [[runs[run if dim == 0 else 1] for runs, dim in zip(inputs, dims, strict=True)] for run in range(3)]
    assert_same_runs(together, [hyper_step(*args, config) for args in picked], TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", HyperParams._fields)
def test_each_coefficient_may_be_the_only_one_that_is_mapped(name: str) -> None:
    config, batch, state = CONFIGS["dynamic K"], tiny_batch(), states(CONFIGS["dynamic K"], 2)[1]
    values = torch.stack([getattr(hyper, name) for hyper in hypers(3)])
    shared = HyperParams(*(value.item() for value in hypers(2)[1]))
    teacher = torch.randn(*batch.input_ids.shape, config.vocab_size, generator=seeded(0), dtype=torch.float64)

    def step(value: Tensor) -> tuple[Any, Any]:
        return hyper_step(state, batch, shared._replace(**{name: value}), config, teacher_logits=teacher)

    together, alone = vmap(step)(values), [step(value) for value in values]
    assert_same_runs(together, alone, TOLERANCE[torch.float64])


def test_the_step_may_be_the_only_thing_that_is_mapped() -> None:
    """Exploration depends on it, and so does what is written into the surprise tensor."""
    config, batch, state = CONFIGS["dynamic K"], tiny_batch(), states(CONFIGS["dynamic K"], 1)[0]
    hyper, steps = HyperParams(explore_prob=0.5, eps=EPS, warmup_steps=4), torch.arange(3)
    together = vmap(lambda step: hyper_step(state._replace(step=step), batch, hyper, config))(steps)
    alone = [hyper_step(state._replace(step=step), batch, hyper, config) for step in steps]
    assert_same_runs(together, alone, TOLERANCE[torch.float64])


@pytest.mark.parametrize("numbers", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_mapped_numbers_of_another_precision_leave_the_dtype_of_the_state(
    dtype: torch.dtype, numbers: torch.dtype
) -> None:
    config, batch = CONFIGS["dynamic K"], tiny_batch()
    state = state_of(spread_params(config, dtype=dtype))
    after, metrics = vmap(lambda h: hyper_step(state, batch, h, config))(stack(hypers(2, numbers)))
    assert {n: leaf.dtype for n, leaf in walk(after)} == {n: leaf.dtype for n, leaf in walk(state)}
    assert metrics.main_loss.isfinite().all()


@given(cases(max_layers=1), st.integers(0, 99))
def test_mapped_runs_equal_single_runs_on_uneven_routing(case: Case, seed: int) -> None:
    config, batch = case.config, case.batch
    runs = [state_of(case.params), state_of(spread_params(config, seed))]
    numbers = [h._replace(pi_alpha=torch.tensor(p)) for h, p in zip(hypers(2), (case.hyper.pi_alpha, 0.7), strict=True)]
    together = vmap(lambda s, h: hyper_step(s, batch, h, config))(stack(runs), stack(numbers))
    alone = [hyper_step(s, batch, h, config) for s, h in zip(runs, numbers, strict=True)]
    assert_same_runs(together, alone, TOLERANCE[torch.float64])


@KINDS
def test_nested_vmap_over_seeds_and_learning_rates_equals_two_loops(kind: str) -> None:
    config, batch = CONFIGS[kind], tiny_batch(CONFIGS[kind])
    seeds, rates = states(config, 2), torch.tensor([1e-3, 1e-2, 0.0], dtype=torch.float64)

    def step(state: TrainState, rate: Tensor) -> Any:
        return hyper_step(state, batch, HyperParams(lr=rate, router_lr=2 * rate, eps=EPS), config)

    nested = vmap(vmap(step, in_dims=(None, 0)), in_dims=(0, None))(stack(seeds), rates)
    for run, state in zip(unstack(nested), seeds, strict=True):
        assert_same_runs(run, [step(state, rate) for rate in rates], TOLERANCE[torch.float64])
    swapped = vmap(vmap(step, in_dims=(0, None)), in_dims=(None, 0))(stack(seeds), rates)
    assert_same_runs(tree_map(lambda leaf: leaf.transpose(0, 1), swapped), unstack(nested), 1e-12)


@KINDS
def test_surprise_of_mapped_parameters_batches_and_budgets_equals_a_loop(kind: str) -> None:
    config = CONFIGS[kind]
    params = [state.params for state in states(config, 3)]
    batches = [tiny_batch(config, seed=run, right=(run,)) for run in range(3)]
    budgets = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)

    def surprise(params: Any, batch: Batch, budget: Any) -> Tensor:
        return per_token_surprise(params, batch, config, HyperParams(pi_alpha=budget))

    inputs = (params, batches, list(budgets))
    for dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        mapped = [stack(runs) if dim == 0 else runs[0] for runs, dim in zip(inputs, dims, strict=True)]
        together = vmap(surprise, in_dims=dims)(*mapped)
        picked = [[runs[run if dim == 0 else 0] for runs, dim in zip(inputs, dims, strict=True)] for run in range(3)]
        assert_close(together, torch.stack([surprise(*args) for args in picked]), 1e-12)
    assert together.isfinite().any()


@KINDS
def test_forward_of_mapped_parameters_equals_a_loop(kind: str) -> None:
    config, batch = CONFIGS[kind], tiny_batch(CONFIGS[kind], right=(2,))
    runs = [state.params for state in states(config, 3)]

    def run(params: Any) -> Any:
        return forward(params, batch.input_ids, config, attention_mask=batch.attention_mask)

    assert_same_runs(vmap(run)(stack(runs)), [run(params) for params in runs], 1e-12)


def test_mapped_routing_and_mapped_exploration_equal_a_loop_bit_for_bit() -> None:
    config = tiny_config(max_experts_per_tok=3)
    logits = 3 * torch.randn(4, 9, 4, generator=seeded(0))
    real, budgets = torch.rand(4, 9, generator=seeded(1)) > 0.2, torch.tensor([0.1, 0.5, 0.9, 1.0])
    seeds = torch.arange(4)

    def explored(seed: Tensor, budget: Tensor) -> Tensor:
        return random_exploration(seed, seed + 7, budget, 1, 9, 4)

    tries = vmap(explored)(seeds, budgets)
    assert torch.equal(tries, torch.stack([explored(s, b) for s, b in zip(seeds, budgets, strict=True)]))

    def routed(logits: Tensor, real: Tensor, budget: Tensor, tries: Tensor) -> Any:
        return route(logits, real, config, budget, None, tries[0])

    for mapped, alone in zip(
        unstack(vmap(routed)(logits, real, budgets, tries)),
        (routed(*args) for args in zip(logits, real, budgets, tries, strict=True)),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(mapped, alone, strict=True))


# ---- gradients through a hyper step --------------------------------------------------------------------------------

SMOOTH = tiny_config(num_experts_per_tok=3)  # no choice of K, and no tie nearby, that a small change could flip
COUPLED = HyperParams(
    lr=0.01, router_lr=0.02, eps=EPS, max_grad_norm=0.5, warmup_steps=3.0, total_steps=20.0, balance_weight=0.2,
    z_weight=0.05, router_coupling=0.7, pi_gamma=0.3, min_lr_ratio=0.1,
)  # fmt: skip


def smooth_state(config: ModelConfig = SMOOTH) -> TrainState:
    """Two steps old, so that the moments are not zero."""
    state = state_of(spread_params(config, 1, router_gain=20.0))
    for step in range(2):
        state, _ = hyper_step(state, tiny_batch(config, seed=30 + step), COUPLED, config)
    return state._replace(step=state.step + 5)  # on the cosine, where every number of the schedule matters


def next_loss(config: ModelConfig, hyper: HyperParams, name: str, steps: int = 1) -> Callable[[Tensor], Tensor]:
    """The coefficient `name` -> main loss on another batch after `steps` hyper steps."""
    start, batch, other = smooth_state(config), tiny_batch(config, right=(1,)), tiny_batch(config, seed=9)

    def loss(value: Tensor) -> Tensor:
        changed, state = hyper._replace(**{name: value}), start
        for _ in range(steps):
            state, _ = hyper_step(state, batch, changed, config)
        return hyper_step(state, other, changed, config)[1].main_loss

    return loss


def next_router(config: ModelConfig, hyper: HyperParams, name: str) -> Callable[[Tensor], Tensor]:
    """The coefficient `name` -> one number that every entry of the next router weighs in, differently."""
    start, batch = smooth_state(config), tiny_batch(config, right=(1,))

    def number(value: Tensor) -> Tensor:
        state, _ = hyper_step(start, batch, hyper._replace(**{name: value}), config)
        router = state.params["layers"]["moe"]["router"]
        return (router * torch.arange(router.numel(), dtype=router.dtype).reshape(router.shape).cos()).sum()

    return number


def slope(function: Callable[[Tensor], Tensor], at: Tensor, width: float = 1e-4) -> Tensor:
    """Central difference of fourth order."""
    h = width * at.abs().clamp_min(1e-2)
    ahead, far = (function(at + n * h) - function(at - n * h) for n in (1, 2))
    return (8 * ahead - far) / (12 * h)


SCHEDULE = ("warmup_steps", "total_steps")  # float32 inside: wide differences, a lower bar


def assert_is_slope(exact: Tensor, function: Callable[[Tensor], Tensor], at: Tensor, name: str) -> None:
    width, tolerance = (3e-2, 1e-3) if name in SCHEDULE else (1e-4, 1e-5)
    assert_close(exact, slope(function, at, width), tolerance, f"d / d {name}")


def value_of(hyper: HyperParams, name: str) -> Tensor:
    return torch.tensor(getattr(hyper, name), dtype=torch.float64)


def by_autograd(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    out = function(leaf)
    assert out.requires_grad, "plain autograd lost the coefficient"
    return torch.autograd.grad(out, leaf)[0]


REACH_THE_LOSS = (
    "lr",
    "router_lr",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "max_grad_norm",
    "surprise_weight",
    "balance_weight",
    "z_weight",
    "router_coupling",
    "min_lr_ratio",
    "warmup_steps",
    "total_steps",
)
REACH_THE_ROUTER = tuple(name for name in REACH_THE_LOSS if name not in ("lr", "weight_decay"))


@pytest.mark.parametrize("name", REACH_THE_LOSS)
def test_the_next_loss_is_differentiated_through_a_coupled_hyper_step(name: str) -> None:
    """Against central differences in float64. Coupling 1 afterwards: no path of the loss is cut."""
    start, batch, other = smooth_state(), tiny_batch(right=(1,)), tiny_batch(seed=9)

    def loss(value: Tensor) -> Tensor:
        state, _ = hyper_step(start, batch, COUPLED._replace(**{name: value}), SMOOTH)
        return hyper_step(state, other, COUPLED._replace(router_coupling=1.0), SMOOTH)[1].main_loss

    at = value_of(COUPLED, name)
    exact = grad(loss)(at)
    assert exact != 0
    assert_is_slope(exact, loss, at, name)
    assert_close(by_autograd(loss, at), exact, 1e-9, f"plain autograd: d loss / d {name}")


@pytest.mark.parametrize("name", REACH_THE_ROUTER)
def test_the_next_router_is_differentiated_through_a_hyper_step(name: str) -> None:
    number, at = next_router(SMOOTH, COUPLED, name), value_of(COUPLED, name)
    exact = grad(number)(at)
    assert exact != 0
    assert_is_slope(exact, number, at, name)
    assert_close(by_autograd(number, at), exact, 1e-9, f"plain autograd: d router / d {name}")


def test_the_learning_rate_is_differentiated_through_a_decoupled_step_with_one_expert_a_token() -> None:
    """With one expert the weight is 1 whatever the router says: the cut between the systems cuts no path."""
    loss = next_loss(tiny_config(num_experts_per_tok=1), HyperParams(eps=EPS), "lr", steps=3)
    at = torch.tensor(0.01, dtype=torch.float64)
    assert_close(grad(loss)(at), slope(loss, at), 1e-5)


def test_at_the_default_coupling_the_slope_in_the_learning_rate_lacks_the_routers_part() -> None:
    """A step changes what the router sees, and so the weights; that path is cut. In the README's model it is 0.5 %."""
    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8)
    text = torch.tensor(list(b"to route or not to route, that is the question; " * 3)[:129])
    batch = Batch(text[:128].view(4, 32), text[1:].view(4, 32), torch.ones(4, 32, dtype=torch.int64))
    start = state_of(tree_map(lambda leaf: leaf.double(), init_params(config, torch.Generator().manual_seed(0))))

    def off(coupling: float) -> float:
        def loss(rate: Tensor) -> Tensor:
            hyper = HyperParams(lr=rate, router_coupling=coupling)
            state, _ = hyper_step(start, batch, hyper, config)
            return hyper_step(state, batch, hyper, config)[1].main_loss

        at = torch.tensor(1e-3, dtype=torch.float64)
        return abs(float(grad(loss)(at) / slope(loss, at) - 1))

    assert HyperParams().router_coupling == 0.0
    assert 0.004 < off(0.0) < 0.006
    assert off(1.0) < 1e-8


@pytest.mark.parametrize("name", ["router_lr", "surprise_weight", "z_weight"])
def test_without_coupling_the_next_loss_has_exactly_no_slope_in_what_moves_the_router_alone(name: str) -> None:
    decoupled = COUPLED._replace(router_coupling=0.0)
    at = value_of(COUPLED, name)
    assert grad(next_loss(SMOOTH, decoupled, name))(at) == 0
    assert grad(next_loss(SMOOTH, COUPLED, name))(at) != 0


def test_the_budget_moves_k_and_has_exactly_no_slope_because_k_is_a_count() -> None:
    """It cannot be learned by gradient through the hyper step."""
    dynamic = tiny_config(num_experts_per_tok=-1)
    loss, at = next_loss(dynamic, COUPLED, "pi_alpha"), torch.tensor(0.6, dtype=torch.float64)
    assert loss(at) != loss(torch.tensor(0.9, dtype=torch.float64))
    assert grad(loss)(at) == 0


@pytest.mark.parametrize("name", ["lr", "router_lr", "router_coupling"])
def test_forward_mode_through_a_hyper_step_equals_reverse_mode(name: str) -> None:
    loss, at = next_loss(SMOOTH, COUPLED, name), value_of(COUPLED, name)
    assert_close(jvp(loss, (at,), (torch.ones_like(at),))[1], grad(loss)(at), 1e-9)


def test_mapped_gradients_through_hyper_steps_equal_a_loop() -> None:
    loss = next_loss(SMOOTH, COUPLED, "lr", steps=2)
    rates = torch.tensor([1e-3, 1e-2, 3e-2], dtype=torch.float64)
    assert_close(vmap(grad(loss))(rates), torch.stack([grad(loss)(rate) for rate in rates]), 1e-9)


def test_a_second_derivative_through_a_hyper_step_is_the_slope_of_the_first() -> None:
    loss, at = next_loss(SMOOTH, COUPLED._replace(router_coupling=1.0), "lr"), torch.tensor(0.01, dtype=torch.float64)
    assert_close(grad(grad(loss))(at), slope(grad(loss), at), 1e-4)


def test_a_step_of_which_nothing_is_mapped_runs_inside_a_vmap() -> None:
    config = tiny_config()
    state, batch = states(config, 1, torch.float32)[0], tiny_batch(config, 2, 6)
    alone = hyper_step(state, batch, HyperParams(), config)[1].main_loss
    loss, numbers = vmap(lambda x: (hyper_step(state, batch, HyperParams(), config)[1].main_loss, x))(torch.arange(2.0))
    assert torch.equal(loss, alone.expand(2))
    assert numbers.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["lr", "router_lr", "router_coupling"])
def test_a_single_precision_step_is_differentiated_as_a_double_one(name: str) -> None:
    """The kernels' gradients are followed, too: what they have saved belonged to the gradient inside."""
    config, batch = tiny_config(num_experts_per_tok=2), tiny_batch(tiny_config(), 2, 6)
    hyper = HyperParams(router_coupling=0.5, balance_weight=0.1)

    def after(number: Tensor, state: TrainState) -> Tensor:
        new, metrics = hyper_step(state, batch, hyper._replace(**{name: number}), config)
        return metrics.balance_loss + sum(leaf.square().sum() for _, leaf in walk(new.params))

    single, double = (
        grad(after)(torch.tensor(0.3, dtype=dtype), states(config, 1, dtype)[0])
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(single.double(), double, 1e-3)
