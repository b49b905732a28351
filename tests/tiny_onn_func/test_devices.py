"""What accelerators run instead of the CPU's ways gives the same values, and generation reads nothing back."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from tests.helpers import assert_close, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import attention, forward, init_params
from tiny_onn_func.inference import decode as decoding
from tiny_onn_func.inference import expert_visits, layer_weights
from tiny_onn_func.inference.generate import generate
from tiny_onn_func.primitives import grouped
from tiny_onn_func.tree import stack, to_device, tree_map
from training import HyperParams, TrainState, hyper_step, init_state

CONFIGS = {"K=2": tiny_config(num_experts_per_tok=2), "dynamic K": tiny_config()}


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the ways of a device whose values the host does not see."""
    monkeypatch.setattr(grouped, "_reads_offsets", lambda offsets: False)
    monkeypatch.setattr(grouped.runtime, "supports", lambda *tensors: False)
    monkeypatch.setattr(attention, "_uses_library", lambda q: True)
    for module in (decoding, expert_visits, layer_weights):
        monkeypatch.setattr(module, "reads", lambda device: False)


def step_of(config: Any, runs: int, dtype: torch.dtype) -> tuple[TrainState, Any]:
    state = init_state(config, seeded(0))._replace(params=spread_params(config, router_gain=3.0))
    state = type(state)(*(to(part, dtype) for part in state))
    batch = tiny_batch(config, 4, 6, 0, left=(0, 2), right=(1,), unlabelled=0.2)
    hyper = HyperParams(balance_weight=0.3, router_coupling=0.5, explore_prob=0.2)
    if not runs:
        return hyper_step(state, batch, hyper, config)
    return vmap(lambda state: hyper_step(state, batch, hyper, config))(stack([state] * runs))


def to(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("runs", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_on_an_accelerators_ways_equals_the_cpus(
    name: str, runs: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    expected = step_of(CONFIGS[name], runs, dtype)
    request.getfixturevalue("as_on_an_accelerator")
    actual = step_of(CONFIGS[name], runs, dtype)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_close(a, b, 1e-9 if dtype == torch.float64 else 2e-3, "a leaf of state and metrics")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_the_library_equals_the_reference_where_queries_see_no_key(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])
    bias = attention.causal_bias(mask, 5, torch.device("cpu"), dtype)
    shapes = (2, 2, 3, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)
    inputs = [
        torch.randn(shape, generator=seeded(i), dtype=dtype, requires_grad=True) for i, shape in enumerate(shapes)
    ]
    out, (expected, _) = attention._attend_by_library(*inputs, bias), attention.attend_reference(*inputs, bias)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert_close(out.detach(), expected.detach(), tolerance)
    assert not out[0, :2].any()
    upstream = torch.randn(out.shape, generator=seeded(9), dtype=dtype)
    for slope, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert_close(slope, wanted, tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", [1, 5])
def test_text_on_an_accelerators_ways_equals_the_cpus(name: str, prompt: int, request: pytest.FixtureRequest) -> None:
    config, params = CONFIGS[name], spread_params(CONFIGS[name], router_gain=3.0)
    ids = torch.randint(0, config.vocab_size, (2, prompt), generator=seeded(1))
    expected = generate(params, ids, config, seeded(0), max_new_tokens=8)
    request.getfixturevalue("as_on_an_accelerator")
    assert torch.equal(generate(params, ids, config, seeded(0), max_new_tokens=8), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_reads_nothing_back(name: str, padded: bool, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    params = to_device(to(init_params(config, seeded(0)), dtype), "meta")
    ids, mask = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.ones(2, 3, dtype=torch.int64, device="meta")
    state = decoding.start_decoding(params, config, 2, 9, attention_mask=mask if padded else None)
    tokens, start = ids, 0
    for _ in range(3):
        logits, _ = decoding.decode(state, tokens, start)
        start += tokens.shape[1]
        tokens = logits.argmax(dim=-1, keepdim=True)
        assert logits.device.type == "meta"


def test_forward_follows_the_device_of_its_parameters() -> None:
    config = CONFIGS["K=2"]
    params = to_device(init_params(config, seeded(0)), "meta")
    logits, trace = forward(params, torch.zeros(2, 3, dtype=torch.int64, device="meta"), config)
    assert {t.device.type for t in (logits, *trace) if isinstance(t, Tensor)} == {"meta"}
