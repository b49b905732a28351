"""The same weights in `transformers` and here: logits, loss and every leaf's gradient agree at fixed K.

Their norms and softmaxes compute in float32 whatever the parameters are, so float64 models agree to 1e-6 (logits) and
1e-5 (gradients), float32 models to 1e-4. All that stands between the two is a table of names.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the network

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import assert_close, seeded, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.tree import Tree, flatten, unflatten
from training import Batch
from training.step.losses import language_modelling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of their numbers
    transformers = pytest.importorskip("transformers")

TIED = (True, False)
LAYER_LEAVES = {  # ours -> (theirs, whether (in, out) is transposed there)
    "input_layernorm": ("input_layernorm.weight", False),
    "post_attention_layernorm": ("post_attention_layernorm.weight", False),
    "self_attn.q_proj": ("self_attn.q_proj.weight", True),
    "self_attn.k_proj": ("self_attn.k_proj.weight", True),
    "self_attn.v_proj": ("self_attn.v_proj.weight", True),
    "self_attn.o_proj": ("self_attn.o_proj.weight", True),
    "self_attn.q_norm": ("self_attn.q_norm.weight", False),
    "self_attn.k_norm": ("self_attn.k_norm.weight", False),
    "moe.router": ("mlp.gate.weight", True),
    "moe.w2": ("mlp.experts.down_proj", True),
}


def config_of(tied: bool = True, top_k: int = 2) -> ModelConfig:
    return tiny_config(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6, moe_intermediate_size=5,
        num_experts=6, num_experts_per_tok=top_k, tie_word_embeddings=tied, rope_theta=5000.0,
    )  # fmt: skip


def peer_of(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """A Qwen3-MoE of theirs with the sizes of a config, every weight random, norms too."""
    sizes = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim, moe_intermediate_size=config.moe_intermediate_size, intermediate_size=7,
        num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True,
        rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False,
    )  # fmt: skip
    theirs = transformers.Qwen3MoeConfig(**sizes)
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    peer = transformers.Qwen3MoeForCausalLM(theirs).to(dtype).eval()
    generator = seeded(1)
    with torch.no_grad():
        for weight in peer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4)
    return peer


def ours_from(tensors: dict[str, Tensor], config: ModelConfig) -> Tree:
    """Their weights, or gradients, under our names."""
    flat = {"embed_tokens": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    if not config.tie_word_embeddings:
        flat["lm_head"] = tensors["lm_head.weight"].mT
    layers = range(config.num_hidden_layers)
    for name, (their_name, transposed) in LAYER_LEAVES.items():
        stacked = torch.stack([tensors[f"model.layers.{i}.{their_name}"] for i in layers])
        flat[f"layers.{name}"] = stacked.mT if transposed else stacked
    both = torch.stack([tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] for i in layers]).mT
    flat["layers.moe.w1"], flat["layers.moe.w3"] = both.chunk(2, dim=-1)
    return unflatten(flat)


def with_bias(params: Tree, config: ModelConfig) -> Tree:
    flat = flatten(params)
    bias = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=flat["norm"].dtype)
    return unflatten(flat | {"layers.moe.router_bias": bias})


# Their float64 mask becomes -inf in a float32 softmax: rows that see no key, padding on the left, turn to NaN there.
@pytest.mark.parametrize(
    ("left", "right", "dtype", "tolerance"),
    [
        ((), (), torch.float64, 1e-6),
        ((), (0, 2, 5), torch.float64, 1e-6),
        ((0, 2, 5), (), torch.float32, 1e-4),
    ],
    ids=["no padding", "padding on the right", "padding on the left"],
)
@pytest.mark.parametrize("tied", TIED)
def test_logits_equal_those_of_qwen3_moe(
    tied: bool, left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    config = config_of(tied)
    peer = peer_of(config, dtype)
    batch = tiny_batch(config, 3, 9, left=left, right=right)
    params = with_bias(ours_from(dict(peer.named_parameters()), config), config)
    with torch.no_grad():
        theirs = peer(batch.input_ids, attention_mask=batch.attention_mask).logits
        logits, _ = forward(params, batch.input_ids, config, attention_mask=batch.attention_mask)
    real = batch.attention_mask != 0
    assert_close(logits[real], theirs[real], tolerance, "logits")


@pytest.mark.parametrize("top_k", [1, 6])
def test_logits_are_equal_at_one_expert_and_at_all(top_k: int) -> None:
    config = config_of(top_k=top_k)
    peer = peer_of(config, torch.float32)
    batch = tiny_batch(config, 2, 7)
    with torch.no_grad():
        theirs = peer(batch.input_ids).logits
        logits, _ = forward(
            with_bias(ours_from(dict(peer.named_parameters()), config), config), batch.input_ids, config
        )
    assert_close(logits, theirs, 1e-4, "logits")


@pytest.mark.parametrize("tied", TIED)
def test_one_training_step_has_their_gradients_leaf_by_leaf(tied: bool) -> None:
    """The standard top-k router learns from the main loss: our coupling of 1."""
    config = config_of(tied)
    peer = peer_of(config, torch.float64)
    batch = tiny_batch(config, 3, 9, right=(0, 3, 0))
    theirs = peer(batch.input_ids, attention_mask=batch.attention_mask).logits
    F.cross_entropy(theirs.flatten(0, 1), batch.labels.flatten()).backward()
    wanted = flatten(ours_from({name: weight.grad for name, weight in peer.named_parameters()}, config))
    params = with_bias(ours_from({n: w.detach() for n, w in peer.named_parameters()}, config), config)
    grads = flatten(torch.func.grad(mean_loss)(params, batch, config))
    assert wanted.keys() == grads.keys() - {"layers.moe.router_bias"}
    for name, gradient in wanted.items():
        assert_close(grads[name], gradient, 1e-5, name)


def mean_loss(params: Tree, batch: Batch, config: ModelConfig) -> Tensor:
    logits, _ = forward(params, batch.input_ids, config, attention_mask=batch.attention_mask, router_coupling=1.0)
    lm = language_modelling(logits, batch.labels)
    return lm.loss_sum / lm.targets


def test_without_coupling_the_router_has_no_gradient_where_theirs_has() -> None:
    config = config_of()
    params, batch = init_params(config, seeded(0), torch.float64), tiny_batch(config)
    coupled = torch.func.grad(mean_loss)(params, batch, config)["layers"]["moe"]["router"]

    def decoupled_loss(params: Tree) -> Tensor:
        return language_modelling(forward(params, batch.input_ids, config)[0], batch.labels).loss_sum

    assert coupled.abs().max() > 0
    assert torch.func.grad(decoupled_loss)(params)["layers"]["moe"]["router"].abs().max() == 0
