"""What the tests share: tiny models, awkward batches, strategies that draw them, asserts that print a statistic."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from tiny_onn_func import ModelConfig, init_params
from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.tree import flatten, unflatten, walk
from training import Batch, HyperParams
from training.step.batch import IGNORE_INDEX

ROOT = Path(__file__).parents[1]  # of the repository
TINY = ModelConfig(
    vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    moe_intermediate_size=6, num_experts=4,
)  # fmt: skip

# Static choices of routing beside `routing` itself: what must hold for any router rule is tested for each of these
CHOICES: dict[str, dict[str, Any]] = {
    "hash with learned weights": dict(routing="hash", hash_weights="router", num_experts_per_tok=2),
    "hash with learned weights, dynamic": dict(routing="hash", hash_weights="router"),
    "hash in the first layer": dict(routing="hash", hash_layers="0", num_experts_per_tok=2),
    "hash in the last layer, learned weights": dict(routing="hash", hash_layers="1", hash_weights="router"),
    "hash of the previous token": dict(routing="hash", hash_key="previous", num_experts_per_tok=2),
    "hash of the pair": dict(routing="hash", hash_key="pair", num_experts_per_tok=2),
    "sigmoid gate": dict(gate="sigmoid", num_experts_per_tok=2),
    "sigmoid gate, dynamic": dict(gate="sigmoid"),
    "sigmoid gate, hash with learned weights": dict(gate="sigmoid", routing="hash", hash_weights="router"),
    "shared expert": dict(shared_expert_intermediate_size=5, num_experts_per_tok=2),
    "table": dict(routing="hash", hash_key="table", num_experts_per_tok=2),
    "table with learned weights": dict(routing="hash", hash_key="table", hash_weights="router"),
    "stable": dict(routing="stable", num_experts_per_tok=2),
    "stable, dynamic": dict(routing="stable"),
    "k-means": dict(routing="kmeans", num_experts_per_tok=2),
    "default outputs": dict(default_outputs=True, num_experts_per_tok=2),
    "default outputs, hash in a layer, sigmoid": dict(
        default_outputs=True, routing="hash", hash_layers="1", hash_weights="router", gate="sigmoid"
    ),
    "hash of the position": dict(routing="hash", hash_key="position", num_experts_per_tok=2),
}


def example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    return script(f"examples/{name}.py")


def script(path: str) -> ModuleType:
    """A script of the repository, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(**changes: Any) -> ModelConfig:
    """TINY with some sizes changed; dynamic K unless `num_experts_per_tok` says otherwise."""
    return ModelConfig(**(vars(TINY) | changes))


def seeded(seed: int) -> Generator:
    """A fresh CPU generator."""
    return torch.Generator().manual_seed(seed)


def spread_params(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, router_gain: float = 50.0
) -> dict[str, Any]:
    """Parameters that route unevenly: fresh ones are almost uniform, here the router is `router_gain` times larger."""
    params = flatten(init_params(config, seeded(seed), dtype))
    params["layers.moe.router"] = params["layers.moe.router"] * router_gain
    return unflatten(params)


def tiny_batch(
    config: ModelConfig = TINY,
    batch: int = 2,
    seq: int = 5,
    seed: int = 0,
    *,
    left: tuple[int, ...] = (),
    right: tuple[int, ...] = (),
    unlabelled: float = 0.0,
) -> Batch:
    """Random tokens; row b has `left[b]` and `right[b]` positions of padding, and a share of real ones has no label.

    Padding carries random tokens too (nobody may read them) and never a label.
    """
    generator = seeded(seed)
    tokens = torch.randint(config.vocab_size, (batch, seq + 1), generator=generator)
    position = torch.arange(seq)
    first = torch.tensor(left + (0,) * (batch - len(left)))[:, None]
    last = seq - torch.tensor(right + (0,) * (batch - len(right)))[:, None]
    real = (position >= first) & (position < last)
    labelled = real & (torch.rand(batch, seq, generator=generator) >= unlabelled)
    return Batch(tokens[:, :-1], torch.where(labelled, tokens[:, 1:], IGNORE_INDEX), real.long())


def real_tokens(batch: Batch) -> Tensor:
    """(B*S,) bool."""
    return batch.attention_mask.flatten() != 0


class Case(NamedTuple):
    """One drawn situation: a model, its parameters, what it sees and with what numbers."""

    config: ModelConfig
    params: dict[str, Any]
    batch: Batch
    hyper: HyperParams


@st.composite
def configs(draw: st.DrawFn, max_experts: int = 5, max_layers: int = 2) -> ModelConfig:
    """Tiny sizes, odd ones and 1 included, fixed and dynamic K, K = 1, K = E and E = 1 all within reach."""
    experts = draw(st.integers(1, max_experts))
    top_k = draw(st.sampled_from([DYNAMIC_K, DYNAMIC_K, 1, experts]) | st.integers(1, experts))
    cap = draw(st.none() | st.integers(max(1, top_k), experts))  # -1 is dynamic
    groups = draw(st.sampled_from([1, 2]))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 11)),
        hidden_size=draw(st.sampled_from([3, 4, 8])),
        num_hidden_layers=draw(st.integers(1, max_layers)),
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        moe_intermediate_size=draw(st.sampled_from([1, 3, 4])),
        num_experts=experts,
        num_experts_per_tok=top_k,
        min_experts_per_tok=draw(st.integers(1, top_k if top_k > 0 else cap or experts)),
        max_experts_per_tok=cap,
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def batches(draw: st.DrawFn, config: ModelConfig, max_batch: int = 3, max_seq: int = 6) -> Batch:
    """Random tokens with padding on either side, up to all of it, and labels missing, up to all of them."""
    rows, seq = draw(st.integers(1, max_batch)), draw(st.integers(1, max_seq))
    left = tuple(draw(st.lists(st.integers(0, seq), min_size=rows, max_size=rows)))
    right = tuple(draw(st.integers(0, seq - cut)) for cut in left)
    unlabelled = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return tiny_batch(config, rows, seq, draw(st.integers(0, 999)), left=left, right=right, unlabelled=unlabelled)


ROUTERS = ("spread", "even", "tied", "one takes all", "huge", "tiny")


def shape_router(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same parameters with a router of one of the kinds ROUTERS."""
    flat = dict(flatten(params))
    router = flat["layers.moe.router"]
    if kind == "one takes all":  # by bias: a router without offset cannot prefer one expert for every token
        flat["layers.moe.router_bias"] = torch.zeros_like(flat["layers.moe.router_bias"]).index_fill(
            -1, torch.tensor([router.shape[-1] - 1]), 100.0
        )
    else:
        gain = {"spread": 50.0, "even": 1.0, "tied": 0.0, "huge": 1e6, "tiny": 1e-30}[kind]
        flat["layers.moe.router"] = router * gain
    return unflatten(flat)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_experts: int = 5, max_layers: int = 2) -> Case:
    """A whole situation with routing that is uneven on purpose."""
    config = draw(configs(max_experts, max_layers))
    params = init_params(config, seeded(draw(st.integers(0, 999))), dtype)
    params = shape_router(params, draw(st.sampled_from(ROUTERS)))
    hyper = HyperParams(pi_alpha=draw(st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0])))
    return Case(config, params, draw(batches(config)), hyper)


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """max |actual - wanted| / max |wanted| over the finite entries; inf when shapes or the finite places differ."""
    if actual.shape != wanted.shape or not torch.equal(actual.isfinite(), wanted.isfinite()):
        return torch.inf
    kept = wanted.isfinite()
    if not kept.any():
        return 0.0
    actual, wanted = actual[kept].double(), wanted[kept].double()
    difference = (actual - wanted).abs().max()
    return 0.0 if difference == 0 else float(difference / wanted.abs().max())


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float, what: str = "value") -> None:
    """Relative to the largest entry; the places of +inf must be the same."""
    error = relative_error(actual, wanted)
    assert error <= tolerance, f"{what}: relative error {error:.3e}, allowed {tolerance:.1e}"


def assert_same_bits(actual: Any, wanted: Any, what: str = "tree") -> None:
    """Structure, shapes, dtypes and every bit of every leaf."""
    ours, theirs = dict(walk(actual)), dict(walk(wanted))
    assert list(ours) == list(theirs), f"{what}: leaves {list(ours)}, expected {list(theirs)}"
    for name, leaf in theirs.items():
        came = ours[name]
        assert (came.shape, came.dtype) == (leaf.shape, leaf.dtype), f"{what}.{name}: {came.shape} {came.dtype}"
        changed = int((as_bits(came) != as_bits(leaf)).sum())
        assert changed == 0, f"{what}.{name}: {changed} of {as_bits(leaf).numel()} bytes differ"


def as_bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0 and nan equals itself."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
