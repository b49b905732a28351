"""Surgery: every MLP of a dense Qwen3 becomes experts, everything else is kept; the function stays the same.

A dense MLP is a sum over its hidden neurons, `y = sum_i silu(x w1_i) (x w3_i) w2_i`. Dealt out to E experts, y is the
sum of theirs. A layer here gives the *weighted mean* of its experts, weights `p` renormalised over those kept, so

    w2_e = E * (its rows of the dense w2),    router = 1e-6 * noise  =>  p_e = 1/E,    sum_e p_e y_e = y.

With all experts active that is the dense model, to rounding (E a power of two: w2 is exact in any dtype). With K of E
experts a token gets E/K times the sum of those it visits: right on average over random experts, as in dropout. The
noise only breaks the tie: without it every token would visit the same K experts.

With a calibration text the neurons of an expert are those that are active together, and the router ranks the experts by
how much they would add, as far as a linear map can tell. Then what is left out is small, and the plain sum of the K
experts visited is best: if such a cut is asked for a fixed K, w2 is times K instead of E.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.huggingface.config import DENSE, MOE, OWN, config_values, read_config, shown
from tiny_onn_func.huggingface.folder import DTYPES, Stored, read_headers, read_tensors, write_folder
from tiny_onn_func.huggingface.layout import layout
from tiny_onn_func.huggingface.pretrained import check_headers
from training.commands.clusters import calibrate, cluster_neurons, fit_router, read_calibration
from training.commands.target import check_out
from training.errors import UserError

SHARD_BYTES = 64 << 20  # of the result: small, for nothing larger is ever in memory but a layer
ROUTER_LOGIT_STD = 1e-6  # at the inputs that the layer makes: 20 values of float32 near p = 1/E, and no logit feels it
ROUTER_SEED = 0
KEPT_KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
KEPT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
MAX_FILE_BYTES = 1 << 27


def cut_into_experts(
    model: str | Path,
    out: str | Path,
    *,
    num_experts: int,
    num_experts_per_tok: int | None = None,
    split: str = "contiguous",
    calibration: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a dense Qwen3 folder as a Tiny-ONN folder, layer by layer; returns its absolute path.

    No more than a layer, or the embedding, is in memory besides what is read. Dtypes are kept.

    Args:
        model: folder with config.json, and safetensors in one file or in shards.
        out: a new or empty folder.
        num_experts: E, a divisor of the dense model's `intermediate_size`.
        num_experts_per_tok: K of the result; all experts by default, which is the dense model; -1 for dynamic K.
            With `clusters` w2 is made for this K.
        split: `contiguous` slices of the hidden axis, or `clusters` of neurons that are active together.
        calibration: a text file that `clusters` needs: its first tokens are run through the dense model.
        force: replace an earlier result in `out`.

    Raises:
        UserError, ValueError: what is there is no dense Qwen3, broken or hostile; a number is out of range; `out`
            holds something else. One line, and nothing is written.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: expected a folder with a dense Qwen3 model, got none")
    check_out(out, force=force)
    dense, values = read_config(folder, (DENSE,))
    stored = read_headers(folder)
    check_headers(folder, stored, dense, "dense")
    sizes = _expert_sizes(dense, num_experts, num_experts_per_tok)
    states = _open_calibration(folder, dense, stored, split, calibration)
    kind = OWN if sizes.num_experts_per_tok == DYNAMIC_K else MOE
    dtype = str(DTYPES[stored["model.embed_tokens.weight"].dtype]).removeprefix("torch.")
    extra = {key: values[key] for key in KEPT_KEYS if values.get(key) is not None}
    groups = _cut(dense, sizes, stored, states)
    return write_folder(
        out, config_values(sizes, kind, dtype, extra), groups, files=_kept_files(folder), shard_bytes=SHARD_BYTES
    )


def _expert_sizes(dense: ModelConfig, num_experts: int, top_k: int | None) -> ModelConfig:
    """Sizes of the resulting model."""
    inner = dense.moe_intermediate_size
    if num_experts < 1 or inner % num_experts:
        near = sorted((abs(d - num_experts), d) for d in range(1, inner + 1) if inner % d == 0)[:3]
        advice = ", ".join(str(divisor) for _, divisor in near)
        raise UserError(
            f"--num-experts: expected a divisor of intermediate_size ({inner}), got {num_experts}; near: {advice}"
        )
    top_k = num_experts if top_k is None else top_k
    if top_k != DYNAMIC_K and not 1 <= top_k <= num_experts:
        raise UserError(f"--num-experts-per-tok: expected 1 to {num_experts}, or -1 for dynamic, got {top_k}")
    return replace(
        dense, moe_intermediate_size=inner // num_experts, num_experts=num_experts, num_experts_per_tok=top_k
    )


def _open_calibration(
    folder: Path, dense: ModelConfig, stored: Mapping[str, Stored], split: str, text: str | Path | None
) -> Tensor | None:
    if split not in ("contiguous", "clusters"):
        raise UserError(f"--split: expected contiguous or clusters, got {split}")
    if (split == "clusters") != (text is not None):
        raise UserError("--calibration: expected a text file with --split clusters, and none without")
    return None if text is None else read_calibration(folder, Path(text), dense, stored)


def _cut(
    dense: ModelConfig, sizes: ModelConfig, stored: Mapping[str, Stored], states: Tensor | None
) -> Iterator[dict[str, Tensor]]:
    """The result's tensors, in the groups of the layout."""
    generator = torch.Generator().manual_seed(ROUTER_SEED)
    summed = states is not None and sizes.num_experts_per_tok != DYNAMIC_K
    factor = sizes.num_experts_per_tok if summed else sizes.num_experts
    for index, group in enumerate(layout(dense, "dense")):
        tensors = dict(read_tensors(stored, [piece.name for piece in group]))
        prefix = f"model.layers.{index - 1}"
        if f"{prefix}.mlp.gate_proj.weight" not in tensors:
            yield tensors  # as they lie in the mapped file: a copy of the embedding could be as large as all the rest
            continue
        order = None
        if states is None:
            router = torch.randn(sizes.num_experts, sizes.hidden_size, generator=generator)
            router = router / tensors[f"{prefix}.post_attention_layernorm.weight"].float().norm().clamp_min(1e-30)
        else:
            layer = {name.removeprefix(f"{prefix}.").removesuffix(".weight"): t for name, t in tensors.items()}
            place = f"{shown(stored[f'{prefix}.mlp.down_proj.weight'].file)}: {prefix}"
            states, order, router = _cluster(states, layer, dense, sizes.num_experts, place)
        yield _cut_layer(tensors, prefix, sizes, order, router * ROUTER_LOGIT_STD, factor)


def _cluster(
    states: Tensor, layer: Mapping[str, Tensor], dense: ModelConfig, experts: int, place: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The next layer's input on the calibration text, and this layer's order of neurons and router.

    The logits of the router have a standard deviation of 1.
    """
    states, observed = calibrate(states, layer, dense)
    order = cluster_neurons(observed.activations, experts)
    router = fit_router(observed, order, experts)
    router = router / (observed.inputs @ router.mT).std().clamp_min(1e-30)
    if not all(bool(part.isfinite().all()) for part in (states, *observed, router)):
        raise UserError(f"{place}: expected finite numbers on the calibration text, got others; fetch it again")
    return states, order, router


def _cut_layer(
    tensors: dict[str, Tensor], prefix: str, sizes: ModelConfig, order: Tensor | None, router: Tensor, factor: int
) -> dict[str, Tensor]:
    """One layer's tensors: those of the MLP become experts' and a router's, the others stay."""
    parts = {}
    for name, hidden_axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = tensors.pop(f"{prefix}.mlp.{name}.weight")
        weight = weight if order is None else weight.index_select(hidden_axis, order)
        parts[name] = weight.chunk(sizes.num_experts, dim=hidden_axis)
    dtype = parts["gate_proj"][0].dtype
    result = dict(tensors)
    result[f"{prefix}.mlp.gate.weight"] = router.to(dtype)
    if sizes.num_experts_per_tok == DYNAMIC_K:
        result[f"{prefix}.mlp.gate.router_bias"] = torch.zeros(sizes.num_experts, dtype=dtype)
    for expert in range(sizes.num_experts):
        for name, slices in parts.items():
            scale = factor if name == "down_proj" else 1
            result[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = (slices[expert] * scale).contiguous()
    return result


def _kept_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer and the generation settings, as they are."""
    paths = [folder / name for name in KEPT_FILES if (folder / name).is_file()]
    for path in paths:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{shown(path)}: expected at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}")
    return {path.name: path.read_bytes() for path in paths}
