"""Clusters of a dense MLP's neurons that fire together on a calibration text, and a router to them."""

from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.attention import attention, causal_bias
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.huggingface.folder import Stored, read_tensors
from tiny_onn_func.huggingface.layout import EMBEDDING
from tiny_onn_func.ops import rms_norm, rotary_angles, swiglu_reference
from training.data.readers import printable, refuse
from training.data.streams import encode
from training.data.tokenizer import VOCAB_SIZE
from training.errors import UserError
from training.storage.regular_file import open_regular

ROWS, LENGTH = 8, 128  # sequences of the calibration text, and tokens of one
CHARACTERS = 1 << 16  # of the text that is read: more than enough for that many tokens
ROUNDS = 20
RIDGE = 0.1  # of the mean eigenvalue of the inputs' second moment


class Seen(NamedTuple):
    """Inputs, activations and down projection of one dense MLP on the calibration text, in float32."""

    inputs: Float[Tensor, "tokens dim"]
    activations: Float[Tensor, "tokens inner"]  # of its hidden neurons
    down: Float[Tensor, "dim inner"]  # its down_proj, as the checkpoint has it


def read_calibration(
    folder: Path, text: Path, config: ModelConfig, stored: Mapping[str, Stored]
) -> Float[Tensor, "batch seq dim"]:
    """Embed the first tokens of a text file, by the model's tokenizer.json, or as bytes if it has none.

    Raises:
        UserError: the text cannot be read or is too short, its tokens are none of the model's, there is no tokenizer.
    """
    name = printable(text)
    try:
        with TextIOWrapper(open_regular(text), encoding="utf-8", errors="surrogateescape") as file:
            content = file.read(CHARACTERS)
    except OSError as error:
        refuse(name, error)
    ids = torch.tensor(_encode(folder, content, config))[: ROWS * LENGTH]
    if len(ids) < LENGTH:
        raise UserError(f"{name}: expected a text of at least {LENGTH} tokens, got {len(ids)}")
    if int(ids.max()) >= config.vocab_size:
        raise UserError(f"{name}: expected tokens below vocab_size ({config.vocab_size}), got {int(ids.max())}")
    ids = rearrange(ids[: len(ids) // LENGTH * LENGTH], "(batch seq) -> batch seq", seq=LENGTH)
    ((_, embedding),) = read_tensors(stored, (EMBEDDING,))
    return F.embedding(ids, embedding).float()


def calibrate(
    states: Float[Tensor, "batch seq dim"], layer: Mapping[str, Tensor], config: ModelConfig
) -> tuple[Float[Tensor, "batch seq dim"], Seen]:
    """Run one dense layer in float32: the next layer's input, and the inputs and activations of this one's MLP.

    Args:
        states: the residual stream in front of the layer.
        layer: `self_attn.q_proj`, `mlp.gate_proj`, ... -> weights as the checkpoint has them (out, in).
    """
    weights = {name: tensor.float() for name, tensor in layer.items()}
    projections = {
        name.split(".")[-1]: w.mT if w.ndim == 2 else w for name, w in weights.items() if "self_attn" in name
    }
    length = states.shape[1]
    rotary = rotary_angles(torch.arange(length), config.head_dim, config.rope_theta)
    normed = rms_norm(states, weights["input_layernorm"], config.rms_norm_eps)
    x = states + attention(normed, projections, rotary, causal_bias(None, length, states.device, states.dtype), config)
    normed = rms_norm(x, weights["post_attention_layernorm"], config.rms_norm_eps)
    hidden = swiglu_reference(normed @ weights["mlp.gate_proj"].mT, normed @ weights["mlp.up_proj"].mT)
    out = x + hidden @ weights["mlp.down_proj"].mT
    inputs, activations = (rearrange(t, "batch seq size -> (batch seq) size") for t in (normed, hidden))
    return out, Seen(inputs, activations, weights["mlp.down_proj"])


def cluster_neurons(activations: Float[Tensor, "tokens inner"], clusters: int) -> Int[Tensor, " inner"]:
    """Order the neurons so that every run of `inner / clusters` of them fires together.

    Spherical k-means of |activation| over tokens, every cluster of the same size: in each round every neuron goes to
    the nearest centre that has room, the closest ones first. Starts at the contiguous slices; deterministic.
    """
    points = F.normalize(rearrange(activations.abs(), "tokens inner -> inner tokens"), dim=-1)
    size = len(points) // clusters
    order = torch.arange(len(points))
    for _ in range(ROUNDS):
        centres = rearrange(points[order], "(clusters size) tokens -> clusters size tokens", clusters=clusters)
        similarity = points @ F.normalize(centres.mean(dim=1), dim=-1).mT
        updated = assign_evenly(similarity, size).sort(stable=True).indices
        if torch.equal(updated, order):
            break
        order = updated
    return order


def fit_router(observed: Seen, order: Int[Tensor, " inner"], clusters: int) -> Float[Tensor, "clusters dim"]:
    """Ridge regression from an MLP's input to each cluster's output norm ||h_e w2_e||, minus the clusters' mean.

    Only the ranking of its logits matters; the scale is the caller's.
    """
    members = rearrange(order, "(clusters size) -> clusters size", clusters=clusters)
    sizes = [(observed.activations[:, neurons] @ observed.down[:, neurons].mT).norm(dim=-1) for neurons in members]
    wanted = torch.stack(sizes, dim=-1)
    wanted = wanted - wanted.mean(dim=-1, keepdim=True)
    moment = observed.inputs.mT @ observed.inputs
    damping = RIDGE * moment.diagonal().mean().clamp_min(1e-30) * torch.eye(len(moment))
    return torch.linalg.solve(moment + damping, observed.inputs.mT @ wanted).mT


def assign_evenly(similarity: Float[Tensor, "points clusters"], size: int) -> Int[Tensor, " points"]:
    """Assign each point to a cluster, `size` points to each, near their best ones.

    Every point asks for its best cluster with room, which takes the closest; rejected points ask again.
    """
    points, clusters = similarity.shape
    assigned = torch.full((points,), -1)
    for _ in range(clusters):  # each round fills a cluster, or is the last
        waiting = (assigned < 0).nonzero().squeeze(-1)
        if not len(waiting):
            break
        taken = torch.bincount(assigned[assigned >= 0], minlength=clusters)
        best = similarity[waiting].masked_fill(taken >= size, -torch.inf).max(dim=-1)
        for cluster in best.indices.unique().tolist():
            asking = waiting[best.indices == cluster]
            closest = best.values[best.indices == cluster].sort(descending=True, stable=True).indices
            assigned[asking[closest[: size - int(taken[cluster])]]] = cluster
    return assigned


def _encode(folder: Path, text: str, config: ModelConfig) -> list[int]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if config.vocab_size != VOCAB_SIZE:
            raise UserError(f"{printable(path)}: expected the model's tokenizer for --calibration, found none")
        return [int(token) for token in encode(text)]
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("--calibration: expected the package tokenizers; pip install 'tiny-onn-func[hf]'") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{printable(path)}: expected a tokenizer, got: {error}") from None
    usable = text.encode("utf-8", "replace").decode()  # it takes no lone surrogates
    return [int(token) for token in tokenizer.encode(usable, add_special_tokens=False).ids]
