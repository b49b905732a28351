"""The whole step runs on a device that has no values: nothing is read back, no tensor is made on the host."""

import sys
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import LARGE, a_batch
from tests.helpers import tiny_batch
from tiny_onn_func import ModelConfig
from tiny_onn_func.params import count_params, param_specs
from tiny_onn_func.tree import device_of, stack, to_device, unflatten
from training import HyperParams, TrainState, hyper_step, init_state, state_of
from training.step.surprise import SurpriseKind

PLAIN = HyperParams()
EVERY_RULE = HyperParams(
    explore_prob=0.3, target_temperature=0.5, shuffle_targets=1, balance_weight=1.0, z_weight=0.1, router_coupling=0.5,
    bias_speed=0.1, expert_norm=1.0, regenerate_below=0.1, surprise_until=10, freeze_step=5, total_steps=9,
    warmup_steps=2,
)  # fmt: skip
MODELS = [
    (routing, k)
    for routing in ("router", "token", "hash", "thresholds")
    for k in (2, -1)
    if (routing, k) != ("thresholds", 2)
]


class NothingFromTheHost(TorchDispatchMode):
    """Refuses an operation that copies a tensor of the host to the device: it would wait for the device's queue."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if func.namespace == "aten" and name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device.type == outputs.device.type, f"{func}: a copy between the host and the device"
        return outputs


class NothingWide(TorchDispatchMode):
    """Refuses a float64 tensor, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        wide = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]
        assert not wide, f"{func}: made float64"
        return outputs


def a_state(config: ModelConfig, seed: int = 0) -> TrainState:
    return init_state(config, torch.Generator().manual_seed(seed))


def model_of(routing: str, k: int) -> ModelConfig:
    return ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=k, routing=routing)


@pytest.mark.parametrize("hyper", [PLAIN, EVERY_RULE], ids=["plain", "every rule"])
@pytest.mark.parametrize("runs", [0, 2], ids=["one run", "mapped"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("routing", "k", "kind"),
    [(*model, "w2") for model in MODELS] + [("router", 2, kind) for kind in get_args(SurpriseKind) if kind != "w2"],
)
def test_a_step_reads_nothing_back_and_mixes_no_devices(
    routing: str, k: int, kind: SurpriseKind, dtype: torch.dtype | None, runs: int, hyper: HyperParams
) -> None:
    config = model_of(routing, k)
    batch = to_device(tiny_batch(config, 2, 8, 0, left=(0, 2)), "meta")

    def step(state: TrainState) -> Any:
        return hyper_step(state, batch, hyper, config, kind=kind, compute_dtype=dtype)

    state = to_device(stack([a_state(config)] * runs) if runs else a_state(config), "meta")
    with NothingFromTheHost():
        after, metrics = (vmap(step) if runs else step)(state)
    assert {leaf.device.type for leaf in tree_leaves((after, metrics))} == {"meta"}
    assert [leaf.dtype for leaf in tree_leaves(after)] == [leaf.dtype for leaf in tree_leaves(state)]
    assert [leaf.shape for leaf in tree_leaves(after)] == [leaf.shape for leaf in tree_leaves(state)]
    assert device_of(after) == torch.device("meta")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_numbers_that_differ_between_runs_are_used_on_the_device_of_the_states(device: str) -> None:
    config = model_of("router", -1)
    batch = to_device(tiny_batch(config, 2, 8, 0, left=(0, 2)), "meta")
    states = to_device(stack([a_state(config)] * 2), "meta")
    numbers = HyperParams(*(torch.tensor([number, number]).to(device) for number in EVERY_RULE))
    logits = torch.zeros(2, 8, 257, device="meta")  # a teacher's, as every term is computed
    with NothingFromTheHost() if device == "meta" else nullcontext():
        after, metrics = vmap(lambda state, hyper: hyper_step(state, batch, hyper, config, teacher_logits=logits))(
            states, numbers
        )
    assert {leaf.device.type for leaf in tree_leaves((after, metrics))} == {"meta"}


@pytest.mark.parametrize("runs", [0, 2], ids=["one run", "mapped"])
@pytest.mark.parametrize("routing", ["router", "hash", "thresholds"])
def test_a_step_on_mps_makes_no_float64(routing: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has none; the meta device stands in for it."""
    for module in [module for name, module in sys.modules.items() if name.startswith(("tiny_onn_func", "training"))]:
        if hasattr(module, "number_dtype"):
            monkeypatch.setattr(module, "number_dtype", lambda device: torch.float32)
    config = model_of(routing, -1)
    batch = to_device(tiny_batch(config, 2, 8, 0, left=(0, 2)), "meta")
    state = to_device(stack([a_state(config)] * 2) if runs else a_state(config), "meta")
    lr = to_device(torch.tensor([1e-3, 2e-3], dtype=torch.float64), "meta")
    with NothingWide():
        if runs:
            vmap(lambda state, lr: hyper_step(state, batch, EVERY_RULE._replace(lr=lr), config))(state, lr)
        else:
            hyper_step(state, batch, EVERY_RULE, config)
    with pytest.raises(AssertionError, match="float64"), NothingWide():
        torch.zeros(2, device="meta").double()


def test_the_proof_sees_a_value_that_is_read_back_and_a_tensor_of_the_host() -> None:
    """Negative twin."""
    x = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="cannot be called on meta"):
        x.sum().item()
    with pytest.raises(AssertionError, match="a copy between"), NothingFromTheHost():
        torch.as_tensor([0.5], device="cpu").to("meta")


def test_a_step_of_420_million_parameters_runs_without_values() -> None:
    """The model of `benchmarks.speed.gpu`: 28 layers, 32 experts, bfloat16."""
    params = unflatten({name: torch.empty(spec.shape, device="meta") for name, spec in param_specs(LARGE).items()})
    batch = to_device(a_batch(LARGE, 2, 64), "meta")
    with NothingFromTheHost():
        after, _ = hyper_step(state_of(params, LARGE), batch, PLAIN, LARGE, compute_dtype=torch.bfloat16)
    assert sum(leaf.numel() for leaf in tree_leaves(after.params)) == count_params(LARGE) > 4e8
