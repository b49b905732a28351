"""On a CUDA device: the step equals the CPU's, mapped runs the runs alone, nothing waits for the device in a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from tests.helpers import assert_close, relative_error, seeded, spread_params, tiny_batch
from tiny_onn_func import ModelConfig
from tiny_onn_func.inference.generate import generate
from tiny_onn_func.tree import partition, stack, to_device, tree_map, unstack
from training import Batch, HyperParams, TrainState, hyper_step, init_state, per_token_surprise
from training.cli import main
from training.step.main_pass import StepOptions, main_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=2)  # sizes that grouped_mm takes
HYPER = HyperParams(balance_weight=0.3, router_coupling=0.5, bias_speed=0.01, max_grad_norm=0.5)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}


def a_state(dtype: torch.dtype, seed: int = 0) -> TrainState:
    fresh = init_state(CONFIG, seeded(seed))._replace(params=spread_params(CONFIG, router_gain=3.0))
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, fresh)


def a_batch() -> Batch:
    return tiny_batch(CONFIG, 4, 16, 0, left=(0, 2), right=(1,), unlabelled=0.2)


@pytest.fixture
def default_sync_mode_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["w2", "unweighted", "experts", "input", "benefit", "oracle"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_equals_the_cpus(dtype: torch.dtype, kind: Any) -> None:
    state, batch = a_state(dtype), a_batch()
    expected = hyper_step(state, batch, HYPER, CONFIG, kind=kind)
    actual = hyper_step(to_device(state, "cuda"), to_device(batch, "cuda"), HYPER, CONFIG, kind=kind)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_close(a.cpu(), b, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 5e-2)])
def test_surprise_equals_its_oracle_in_float64(dtype: torch.dtype | None, tolerance: float) -> None:
    """In bfloat16 most routes are those of float32; where one differs, another pair is finite."""
    state, batch = a_state(torch.float32), a_batch()
    expected = per_token_surprise(a_state(torch.float64).params, batch, CONFIG, HYPER)
    there = to_device((state, batch), "cuda")
    options = StepOptions(compute_dtype=dtype)
    result = main_gradients(*partition(there[0].params), there[1], HYPER, CONFIG, there[0].step, options)[1]
    surprise = result.per_token_surprise.cpu()
    assert surprise.dtype == torch.float32
    both = surprise.isfinite() & expected.isfinite()
    assert int(both.sum()) > 0.9 * int(expected.isfinite().sum())
    assert relative_error(surprise[both], expected[both]) < tolerance


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_mapped_runs_equal_the_runs_alone(dtype: torch.dtype | None) -> None:
    states, batch = [to_device(a_state(torch.float32, seed), "cuda") for seed in range(3)], to_device(a_batch(), "cuda")
    rates = torch.tensor([1e-3, 2e-3, 3e-3], device="cuda")

    def step(state: TrainState, lr: Any) -> Any:
        return hyper_step(state, batch, HYPER._replace(lr=lr), CONFIG, compute_dtype=dtype)

    together = unstack(vmap(step)(stack(states), rates))
    for state, lr, run in zip(states, rates.tolist(), together, strict=True):
        for a, b in zip(tree_leaves(run), tree_leaves(step(state, lr)), strict=True):
            assert_close(a.cpu(), b.cpu(), 2e-3 if dtype is None else 5e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("runs", [0, 3])
@pytest.mark.usefixtures("default_sync_mode_afterwards")
def test_a_step_waits_for_nothing(dtype: torch.dtype | None, runs: int) -> None:
    state = a_state(torch.float32)
    state, batch = to_device(stack([state] * runs) if runs else state, "cuda"), to_device(a_batch(), "cuda")

    def step(state: TrainState) -> Any:
        return hyper_step(state, batch, HYPER, CONFIG, compute_dtype=dtype)

    step = vmap(step) if runs else step
    step(state)  # loads libraries, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(state)


def test_greedy_text_equals_the_cpus() -> None:
    params = a_state(torch.float64).params
    ids = torch.randint(0, 256, (2, 5), generator=seeded(1))
    expected = generate(params, ids, CONFIG, seeded(0), max_new_tokens=12, temperature=0.0)
    actual = generate(to_device(params, "cuda"), ids.cuda(), CONFIG, seeded(0), max_new_tokens=12, temperature=0.0)
    assert torch.equal(actual.cpu(), expected)


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped_and_goes_on_anywhere(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some lines of text\n" * 900, encoding="utf-8")
    common = ("--data", str(text), "--final-eval-bytes", "2048", "--sample-tokens", "0", "--eval-every", "0")
    common += ("--schedule", "constant", "--device", "cuda")
    assert main(["train", *common, "--out", str(tmp_path / "whole"), "--steps", "6"]) == 0
    assert main(["train", *common, "--out", str(tmp_path / "parts"), "--steps", "3"]) == 0
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--steps", "6"]) == 0
    whole, parts = (tmp_path / name / "checkpoints" / "step_000006" for name in ("whole", "parts"))
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (parts / file.name).read_bytes()
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--steps", "7", "--device", "cpu"]) == 0
    assert main(["evaluate", str(tmp_path / "parts"), "--bytes", "2000"]) == 0
