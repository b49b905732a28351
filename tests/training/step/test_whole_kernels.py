"""A step by whole kernels is the step by its parts, wherever they are used; everywhere else the parts are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from tests.helpers import TINY, batches, configs, seeded, shape_router, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, init_params
from tiny_onn_func.kernels import build
from tiny_onn_func.tree import stack, tree_map, walk
from training import HyperParams, TrainState, hyper_step
from training.step import hyper_step as step_module
from training.step import main_pass
from training.step.hooks import SurpriseHookManager
from training.step.hyper_step import run_pass, state_of
from training.step.main_pass import StepOptions, main_gradients
from training.step.rules import LEAST_SURPRISE, Rule, Targets
from training.step.surprise import MEASURED

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
HYPERS = {
    "bare": HyperParams(),
    "every term": HyperParams(
        balance_weight=0.7, z_weight=0.1, bias_speed=0.01, warmup_steps=10, total_steps=20, min_lr_ratio=0.1,
    ),
    "frozen later": HyperParams(
        surprise_until=5, freeze_step=1, total_steps=20, decay_steps=19, backbone_lr_scale=0.5, max_grad_norm=0.01,
        surprise_sign=-1.0, min_candidates=1, eps=1e-3,
    ),
}  # fmt: skip
DECISIVE = 1e-4  # eps of AdamW: a gradient of rounding alone has no direction


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two kernels were used."""
    names: list[str] = []
    for module, name in ((main_pass, "kernel_pass"), (step_module, "kernel_update")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, whole=whole, name=name: (names.append(name), whole(*a))[1])
    return names


def by_parts(make: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_pass, "pass_is_one_kernel", lambda *_: False)
        patch.setattr(step_module, "update_is_one_kernel", lambda *_: False)
        return make()


def assert_same(make: Callable[[], Any]) -> None:
    """Structure, shapes and dtypes are the same, numbers but for the rounding of sums."""
    whole, parts = dict(walk(make())), dict(walk(by_parts(make)))
    assert list(whole) == list(parts)
    for name, wanted in parts.items():
        if wanted is None:
            assert whole[name] is None
            continue
        assert whole[name].shape == wanted.shape, name
        assert whole[name].dtype == wanted.dtype, name
        torch.testing.assert_close(
            whole[name], wanted, rtol=2e-4, atol=2e-6, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def start(config: ModelConfig, seed: int = 0) -> TrainState:
    state = state_of(spread_params(config, seed, torch.float32, router_gain=5.0), config)
    return state._replace(step=state.step + 3)


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 2, "tie_word_embeddings": False}, {"routing": "token"}]
)
def test_two_steps_by_whole_kernels_are_those_of_the_parts(
    changes: dict[str, Any], hyper: HyperParams, taken: list[str]
) -> None:
    config, hyper = tiny_config(**changes), hyper._replace(eps=DECISIVE)
    batch = tiny_batch(config, 3, 7, left=(0, 2, 0), right=(1, 0, 7))

    def two() -> Any:
        state, first = hyper_step(start(config), batch, hyper, config)
        return *hyper_step(state, batch, hyper, config), first

    assert_same(two)
    assert taken == ["kernel_pass", "kernel_update"] * 2


def test_mapped_runs_by_whole_kernels_are_those_of_the_parts_and_of_each_run_alone(taken: list[str]) -> None:
    batch, rates = tiny_batch(TINY, 3, 7, left=(0, 2, 0)), torch.tensor([1e-3, 2e-3, 3e-3], dtype=torch.float64)
    states, weights = [start(TINY, seed) for seed in range(3)], torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    hyper = HYPERS["every term"]._replace(eps=DECISIVE)

    def one(state: TrainState, lr: Any, weight: Any) -> Any:
        return hyper_step(state, batch, hyper._replace(lr=lr, balance_weight=weight), TINY)

    assert_same(lambda: vmap(one)(stack(states), rates, weights))
    together = vmap(one)(stack(states), rates, weights)
    assert taken == ["kernel_pass", "kernel_update"] * 2
    for run, state in enumerate(states):
        alone, own = one(state, float(rates[run]), float(weights[run])), tree_map(lambda t, run=run: t[run], together)
        for (name, wanted), (_, came) in zip(walk(alone), walk(own), strict=True):
            torch.testing.assert_close(came, wanted, rtol=1e-6, atol=1e-7, msg=name)


@settings(deadline=None)
@given(data=st.data())
def test_a_pass_by_a_whole_kernel_is_that_of_the_parts(data: st.DataObject) -> None:
    config = replace(data.draw(configs()), routing=data.draw(st.sampled_from(["router", "token"])))
    batch, kind = data.draw(batches(config)), data.draw(st.sampled_from([*MEASURED, "oracle"]))
    routers = st.sampled_from(["spread", "even", "tied", "one takes all"])
    params = shape_router(init_params(config, seeded(data.draw(st.integers(0, 99)))), data.draw(routers))
    fast, router = main_pass.partition(params)
    hyper = HyperParams(pi_alpha=data.draw(st.sampled_from([0.01, 0.5, 1.0])))
    step = torch.zeros((), dtype=torch.int64)
    assert_same(lambda: main_gradients(fast, router, batch, hyper, config, step, StepOptions(kind)))


def test_packed_documents_are_kept_apart_by_the_whole_kernel_too() -> None:
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 3, 3, 3]])
    batch = tiny_batch(TINY, 2, 7)._replace(attention_mask=documents)
    assert_same(lambda: hyper_step(start(TINY), batch, HyperParams(eps=DECISIVE), TINY))
    masks = torch.stack((documents, documents.clamp(max=1)))
    states, hyper = stack([start(TINY), start(TINY, 1)]), HyperParams(eps=DECISIVE)
    mapped = vmap(lambda state, mask: hyper_step(state, batch._replace(attention_mask=mask), hyper, TINY))
    assert_same(lambda: mapped(states, masks))


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "float64": ({}, {}, {}, []),
    "bfloat16": ({}, {}, {"compute_dtype": torch.bfloat16}, []),
    "exploration": ({}, {"explore_prob": 0.5}, {}, ["kernel_update"]),
    "a coupled router": ({}, {"router_coupling": 0.5}, {}, []),
    "soft targets": ({}, {"target_temperature": 0.5}, {}, ["kernel_pass"]),
    "regeneration": ({}, {"regenerate_below": 0.1}, {}, ["kernel_pass"]),
    "a teacher": ({}, {"distill_alpha": 0.5}, {"teacher_logits": torch.zeros(2, 5, 13)}, []),
    "hashed tokens": ({"routing": "hash"}, {}, {}, []),
    "thresholds": ({"routing": "thresholds"}, {}, {}, []),
    "surprise of gate and up": ({}, {}, {"kind": "experts"}, ["kernel_update"]),
    "n-grams": ({"ngram_order": 2}, {}, {}, ["kernel_update"]),
    "a bound of the logits": ({"logit_softcap": 5.0}, {}, {}, ["kernel_update"]),
    "a vector of the token": ({"token_bias": True}, {}, {}, ["kernel_update"]),
    "quantile balancing": ({}, {"quantile_balance": 0.5}, {}, ["kernel_pass"]),
    "a sigmoid gate": ({"gate": "sigmoid"}, {}, {}, []),
    "a shared expert": ({"shared_expert_intermediate_size": 3}, {}, {}, ["kernel_update"]),
    "values of the token": ({"value_embeddings": True}, {}, {}, ["kernel_update"]),
}


@pytest.mark.parametrize(("changes", "numbers", "options", "kernels"), OTHERS.values(), ids=OTHERS)
def test_what_a_whole_kernel_does_not_know_is_left_to_the_parts(
    changes: dict[str, Any], numbers: dict[str, Any], options: dict[str, Any], kernels: list[str], taken: list[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    config, hyper = tiny_config(**changes), HyperParams(**numbers, eps=DECISIVE)
    dtype = torch.float64 if "float64" in request.node.callspec.id else torch.float32
    state = state_of(init_params(config, seeded(0), dtype), config)
    assert_same(lambda: hyper_step(state, tiny_batch(config), hyper, config, **options))
    assert taken == kernels


def test_a_derivative_of_the_step_is_that_of_the_parts(taken: list[str]) -> None:
    state, batch = start(TINY), tiny_batch(TINY)

    def loss(lr: Tensor) -> Tensor:
        after, _ = hyper_step(state, batch, HyperParams(lr=lr), TINY)
        return hyper_step(after, batch, HyperParams(), TINY)[1].main_loss

    lr = torch.tensor(1e-2)
    slope = torch.func.grad(loss)(lr)
    assert slope != 0
    assert "kernel_update" not in taken
    followed = lr.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(followed), followed)[0], slope, rtol=1e-3, atol=1e-5)


def test_hooks_of_one_s_own_see_every_expert(taken: list[str]) -> None:
    seen: list[int] = []

    class Own(SurpriseHookManager):
        def apply_w2(self, layer: int, *rest: Any) -> Tensor:
            seen.append(layer)
            return super().apply_w2(layer, *rest)

    state = start(TINY)
    parts = main_pass.partition(state.params)
    run_pass(state, *parts, tiny_batch(TINY), HyperParams(), TINY, StepOptions(), LEAST_SURPRISE, hooks_factory=Own)
    assert seen == [0, 1]
    assert not taken


def test_a_rule_of_one_s_own_teaches_the_router_of_a_whole_kernel(taken: list[str]) -> None:
    def always_last(rule: Any, surprise: Tensor, *_: Any) -> tuple[Any, Targets]:
        target = torch.full(surprise.shape[:-1], surprise.shape[-1] - 1, dtype=torch.int64)
        return rule, Targets(target, torch.ones_like(target, dtype=torch.bool))

    rule = Rule(lambda config: (), always_last)
    make = lambda: hyper_step(start(TINY), tiny_batch(TINY), HyperParams(eps=DECISIVE), TINY, rule=rule)  # noqa: E731
    assert_same(make)
    assert taken == ["kernel_pass", "kernel_update"]
    assert torch.equal(make()[1].target_load[:, -1], torch.ones(TINY.num_hidden_layers))
