"""Static choices of routing: each of them maps, accumulates, reads nothing back, and is the same after a round trip."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from tests.helpers import CHOICES, TINY, assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tests.training.step.test_devices import NothingFromTheHost
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.huggingface.pretrained import inexpressible, load_pretrained, save_pretrained
from tiny_onn_func.tree import flatten, stack, to_device, tree_map, unstack
from training import Batch, HyperParams, TrainState, hyper_step, init_state, state_of
from training.step.accumulate import accumulated_step

HYPER = HyperParams(router_coupling=0.6, balance_weight=0.1, bias_speed=0.01, lr=0.01, router_lr=0.02)


def a_batch(seed: int = 0) -> Batch:
    return tiny_batch(TINY, 4, 6, seed, left=(0, 2, 4), right=(1,), unlabelled=0.2)


def a_state(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> TrainState:
    return state_of(spread_params(config, seed, dtype, router_gain=5.0), config)


@pytest.mark.parametrize("choice", CHOICES)
def test_mapped_runs_of_every_choice_equal_the_runs_alone(choice: str) -> None:
    config, batches = tiny_config(**CHOICES[choice]), [a_batch(seed) for seed in range(2)]
    states = [a_state(config, seed) for seed in range(3)]
    speeds = torch.tensor([0.01, 0.02, 0.04], dtype=torch.float64)
    mapped = stack(states)
    for batch in batches:
        step = lambda state, lr, batch=batch: hyper_step(state, batch, HYPER._replace(router_lr=lr), config)  # noqa: E731
        mapped, measured = vmap(step)(mapped, speeds)
    for run, metrics, state, lr in zip(unstack(mapped), unstack(measured), states, speeds, strict=True):
        alone = state
        for batch in batches:
            alone, wanted = hyper_step(alone, batch, HYPER._replace(router_lr=float(lr)), config)
        for name, leaf in flatten(alone.params).items():
            assert_close(flatten(run.params)[name], leaf, 1e-9, f"{choice}, {name}")
        assert_close(metrics.main_loss, wanted.main_loss, 1e-9, choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_parts_of_a_batch_make_the_step_of_every_choice(choice: str) -> None:
    config = tiny_config(**CHOICES[choice])
    whole, metrics = hyper_step(a_state(config), a_batch(), HYPER, config)
    parts, measured = accumulated_step(a_state(config), a_batch(), HYPER, config, parts=2)
    for name, leaf in flatten(whole.params).items():
        assert_close(flatten(parts.params)[name], leaf, 1e-9, f"{choice}, {name}")
    assert_close(measured.router_loss, metrics.router_loss, 1e-9, choice)


@pytest.mark.parametrize("runs", [0, 2], ids=["one run", "mapped"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_of_every_choice_reads_nothing_back(choice: str, runs: int) -> None:
    config, batch = tiny_config(**CHOICES[choice]), to_device(a_batch(), "meta")

    def step(state: TrainState) -> Any:
        return hyper_step(state, batch, HYPER, config)

    fresh = init_state(config, seeded(0))
    state = to_device(stack([fresh] * runs) if runs else fresh, "meta")
    with NothingFromTheHost():
        after, metrics = (vmap(step) if runs else step)(state)
    assert {leaf.device.type for leaf in tree_leaves((after, metrics))} == {"meta"}
    assert [leaf.dtype for leaf in tree_leaves(after)] == [leaf.dtype for leaf in tree_leaves(state)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_survives_a_folder_and_is_no_qwen3_moe(choice: str, tmp_path: Path) -> None:
    config = tiny_config(**CHOICES[choice])
    params = tree_map(lambda leaf: leaf.float(), spread_params(config))
    save_pretrained(params, config, tmp_path / "out")
    again, config_again = load_pretrained(tmp_path / "out")
    assert config_again == config
    assert_same_bits(again, params)
    assert "model." in str(inexpressible(params, config))


@pytest.mark.parametrize("choice", CHOICES)
def test_no_token_sees_a_later_one_and_padding_changes_nothing(choice: str) -> None:
    config = tiny_config(**CHOICES[choice])
    params, ids = spread_params(config, 3), tiny_batch(TINY, 2, 7).input_ids
    logits, _ = forward(params, ids, config)
    changed = torch.cat((ids[:, :5], (ids[:, 5:] + 1) % TINY.vocab_size), dim=1)
    assert_close(forward(params, changed, config)[0][:, :5], logits[:, :5], 1e-12, choice)
    padded = torch.cat((ids.new_full((2, 2), 3), ids), dim=1)
    mask = torch.cat((ids.new_zeros(2, 2), torch.ones_like(ids)), dim=1)
    assert_close(forward(params, padded, config, attention_mask=mask)[0][:, 2:], logits, 1e-6, choice)
