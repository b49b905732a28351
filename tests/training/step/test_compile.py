"""A traced step is the step: same numbers, alone and mapped, with nothing read from the data while it is traced."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from tests.helpers import tiny_batch, tiny_config
from tiny_onn_func.primitives.grouped import grouped_matmul, grouped_outer
from tiny_onn_func.primitives.tiled import TILE, cut_tiles, tiled_matmul, tiled_outer
from tiny_onn_func.tree import flatten, stack
from training import HyperParams, hyper_step, init_state
from training.step.compile import compile_step, trace_step

HYPER = HyperParams(balance_weight=1.0, warmup_steps=3, bias_speed=0.01)


@given(
    counts=st.lists(st.integers(0, 2 * TILE + 1), min_size=1, max_size=6), unowned=st.integers(0, 5),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_tiles_give_what_groups_give_on_uneven_routing(counts: list[int], unowned: int, seed: int) -> None:
    num_rows = max(1, sum(counts) + unowned)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows, grads, weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((num_rows, 3), (num_rows, 5), (len(counts), 3, 5))
    )
    rows[int(offsets[-1]) :] = torch.nan  # garbage of nobody
    torch.testing.assert_close(tiled_matmul(rows, weights, offsets), grouped_matmul(rows, weights, offsets))
    torch.testing.assert_close(tiled_outer(rows, grads, offsets), grouped_outer(rows, grads, offsets))
    tiles = cut_tiles(offsets, num_rows)
    assert sorted(tiles.rows[tiles.filled].tolist()) == list(range(sum(counts))), "every owned row stands in one place"


@pytest.mark.parametrize(("top_k", "kind"), [(2, "w2"), (-1, "experts")])
def test_a_traced_step_equals_the_step(top_k: int, kind: str) -> None:
    config = tiny_config(num_hidden_layers=1, num_experts_per_tok=top_k)
    batch = tiny_batch(config, 3, 6, left=(0, 2, 0), right=(0, 1, 3), unlabelled=0.3)
    state = init_state(config, torch.Generator().manual_seed(0))
    traced = trace_step(lambda state, batch: hyper_step(state, batch, HYPER, config, kind=kind), state, batch)
    for seed in (1, 2):  # routing and batch that the tracer has not seen
        other = init_state(config, torch.Generator().manual_seed(seed))
        others = tiny_batch(config, 3, 6, seed, left=(1, 0, 0))
        actual, wanted = traced(other, others), hyper_step(other, others, HYPER, config, kind=kind)
        assert_close_trees(actual, wanted)


def test_a_traced_mapped_step_equals_the_mapped_step() -> None:
    config = tiny_config(num_hidden_layers=1, num_experts_per_tok=2)
    batch = tiny_batch(config, 2, 5)

    def step(states, batch, rates):
        return vmap(lambda s, lr: hyper_step(s, batch, HYPER._replace(lr=lr), config))(states, rates)

    states = stack([init_state(config, torch.Generator().manual_seed(seed)) for seed in range(2)])
    rates = torch.tensor([1e-2, 3e-3], dtype=torch.float64)
    traced = trace_step(step, states, batch, rates)
    others = stack([init_state(config, torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    assert_close_trees(traced(others, batch, rates.flip(0)), step(others, batch, rates.flip(0)))


def assert_close_trees(actual, wanted) -> None:
    (new, metrics), (same, wanted_metrics) = actual, wanted
    for name, leaf in flatten(same.params).items():
        torch.testing.assert_close(flatten(new.params)[name], leaf, rtol=2e-4, atol=2e-4)
    for name, value in wanted_metrics._asdict().items():
        torch.testing.assert_close(getattr(metrics, name), value, rtol=2e-4, atol=2e-4, msg=name)


def test_the_compiler_takes_the_traced_step_in_a_process_of_its_own() -> None:
    run = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "import tests.training.step.test_compile as t; t.compile_and_compare('eager')",
    ]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_compiled_program_equals_the_step() -> None:
    run = [sys.executable, "-c", "import tests.training.step.test_compile as t; t.compile_and_compare('inductor')"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def compile_and_compare(backend: str) -> None:
    config = tiny_config(num_hidden_layers=1, num_experts_per_tok=2)
    batch, state = tiny_batch(config, 3, 6), init_state(config, torch.Generator().manual_seed(0))
    compiled = compile_step(lambda s, b: hyper_step(s, b, HYPER, config), state, batch, backend=backend)
    assert_close_trees(compiled(state, batch), hyper_step(state, batch, HYPER, config))
