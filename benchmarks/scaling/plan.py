"""Cost of one training step for a device of a cluster: memory, seconds, bytes, dollars, from sizes alone.

Pure functions of a model, a cluster and a layout, in bytes and seconds. P devices, X of them holding the experts of a
layer together, so R = P / X replicas of every expert; T tokens and N = T * K rows a device; n_d fast parameters beside
the experts, n_e of the experts. Gradients travel as float32, rows in the dtype that is computed in.

Sources: a ring sends 2 (P - 1) / P of a vector to sum it, half of that to gather it or to scatter its sum (Patarasuk
and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002); an exchange sends (X - 1) / X of its rows; sharded optimizer states as
ZeRO-1 (arXiv 1910.02054); 6 FLOPs a parameter and token (arXiv 2001.08361).
"""

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

from tiny_onn_func import ModelConfig
from tiny_onn_func.params import param_specs
from tiny_onn_func.tree import ROUTER_LEAVES
from training.errors import UserError

EXPERT_LEAVES = ("w1", "w2", "w3")
HEADROOM = 0.9  # of a device's memory; the rest is the library's and lost to fragments
COPIES = 3  # of the gradients when several processes add them up: as leaves, as a vector, as their sum
ADAMW_TRAFFIC = 28  # bytes of a float32 parameter's update: it, gradient and moments read; it and moments written
# Bytes that autograd saves for the backward pass, by what they grow with: `python -m benchmarks.memory.saved` fits them
SAVED = {4: (23.6, 17.3, 12.6, 4.2, 9.9, 5.1), 2: (36.7, 13.6, 11.9, 1.9, 39.5, 5.9)}  # of D, Q, N F, N D, E, V
BACKWARD = 8  # bytes a logit, of its float32 gradient and softmax, when all else is still saved


@dataclass(frozen=True)
class Cluster:
    """Machines of equal devices. The defaults: eight H100 SXM a machine, 400 Gb/s of network a device.

    Raises:
        UserError: a number is out of range; the message names it.
    """

    gpus_per_node: int = 8
    tflops: float = 989.0  # 1e12 FLOP/s, dense, in the dtype that is computed in
    utilisation: float = 0.3  # share of them that a step reaches; an assumption until measured on the device
    memory_gib: float = 80.0
    memory_gb_s: float = 3350.0  # 1e9 bytes/s of a device's memory
    intra_gb_s: float = 450.0  # of a device to others of its machine, one direction
    inter_gb_s: float = 50.0  # to other machines
    latency_us: float = 10.0  # of one message
    price: float = 3.0  # dollars a device and hour

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            zero = field.name in ("latency_us", "price")
            if not (0 < value < math.inf or (zero and value == 0)):
                wanted = "0 or more" if zero else "more than 0"
                raise UserError(f"--{field.name.replace('_', '-')}: expected {wanted}, got {value}")
        if self.utilisation > 1:
            raise UserError(f"--utilisation: expected at most 1, got {self.utilisation}")


class Layout(NamedTuple):
    """Layout of a run: number of processes that share a layer's experts, and whether optimizer states are sharded."""

    experts: int = 1  # X
    shard_optimizer: bool = False

    @property
    def name(self) -> str:
        parts = [f"experts {self.experts}"] * (self.experts > 1) + ["sharded"] * self.shard_optimizer
        return " + ".join(parts) or "data"


class Parts(NamedTuple):
    """Parameters: n_d, n_e, and those of the router."""

    dense: int
    experts: int
    router: int


class Memory(NamedTuple):
    """Bytes of a device, by what holds them; `peak` is not their sum, for not all are there at once."""

    weights: float
    moments: float
    gradients: float
    activations: float
    surprise: float
    peak: float


class Plan(NamedTuple):
    """Predicted cost of a step."""

    gpus: int
    layout: Layout
    memory: Memory
    fits: bool
    sent: float  # bytes of a device in a step
    compute: float  # seconds
    communication: float  # seconds, none of it hidden behind computation
    tokens: int  # of a step, of all devices

    @property
    def seconds(self) -> float:
        return self.compute + self.communication

    def dollars(self, cluster: Cluster) -> float:
        """Price of a billion tokens."""
        return self.seconds * self.gpus * cluster.price / 3600 / self.tokens * 1e9


def plan(
    model: ModelConfig, cluster: Cluster, layout: Layout, gpus: int, *, sequences: int, length: int, width: int = 2
) -> Plan:
    """Predict a step of `gpus` devices with `sequences` of `length` tokens each, computed in `width` bytes a number.

    Raises:
        UserError: the layout does not divide the devices or the experts, or a number is out of range.
    """
    _require(gpus >= 1, "--gpus", "1 or more", gpus)
    _require(sequences >= 1, "--sequences", "1 or more", sequences)
    _require(length >= 2, "--length", "2 or more", length)
    _require(width in SAVED, "width", "2 (bfloat16) or 4 (float32) bytes", width)
    _require(layout.experts >= 1 and gpus % layout.experts == 0, "experts", f"a divisor of {gpus} devices", layout)
    fine = model.num_experts % layout.experts == 0
    _require(fine, "experts", f"a divisor of num_experts ({model.num_experts})", layout.experts)
    memory = memory_of(model, layout, gpus, sequences * length, width)
    compute = flops_of(model, sequences * length, length) / (cluster.tflops * 1e12 * cluster.utilisation)
    own_share = sum(_shares(model, layout, gpus))
    compute += ADAMW_TRAFFIC * own_share / (cluster.memory_gb_s * 1e9)
    return Plan(
        gpus, layout, memory, memory.peak <= HEADROOM * cluster.memory_gib * 2**30,
        sum(bytes_sent(model, layout, gpus, sequences * length, width).values()), compute,
        communication_of(model, cluster, layout, gpus, sequences * length, width), gpus * sequences * length,
    )  # fmt: skip


@cache
def parameters(model: ModelConfig) -> Parts:
    """Number of parameters of each part."""
    sizes = {name.rpartition(".")[2]: math.prod(spec.shape) for name, spec in param_specs(model).items()}
    experts, router = (sum(sizes.get(name, 0) for name in names) for names in (EXPERT_LEAVES, ROUTER_LEAVES))
    return Parts(sum(sizes.values()) - experts - router, experts, router)


def memory_of(model: ModelConfig, layout: Layout, gpus: int, tokens: int, width: int = 2) -> Memory:
    """Bytes of a device with `tokens` tokens.

    A step is pure: while it updates, the state before and the state after it are both there. So
    peak = max(state + computed copy + gradients + activations + surprise, 2 state + gradients' copies + surprise).
    """
    dense, experts, router = parameters(model)
    own = dense + experts / layout.experts
    weights, moments = 4 * (own + router), 8 * (sum(_shares(model, layout, gpus)) + router)
    surprise = 4.0 * model.num_hidden_layers * tokens * model.num_experts  # (L, T, E) float32
    activations = saved_of(model, tokens, width) + BACKWARD * tokens * model.vocab_size
    copy = width * own if width < 4 else 0
    backward = weights + moments + copy + 4 * own + activations + surprise
    update = 2 * (weights + moments) + 4 * own * (COPIES if gpus > 1 else 1) + surprise
    return Memory(weights, moments, 4 * own, activations, surprise, max(backward, update))


def saved_of(model: ModelConfig, tokens: int, width: int) -> float:
    """Bytes that autograd saves of a forward pass; rows N = T * K."""
    heads, rows = model.num_attention_heads * model.head_dim, tokens * model.routes_per_token
    hidden, queries, row_inner, row_hidden, experts, vocab = SAVED[width]
    layer = tokens * (hidden * model.hidden_size + queries * heads + experts * model.num_experts)
    layer += rows * (row_inner * model.moe_intermediate_size + row_hidden * model.hidden_size)
    return float(model.num_hidden_layers * layer + vocab * tokens * model.vocab_size)


def flops_of(model: ModelConfig, tokens: int, length: int) -> float:
    """FLOPs of a device's step: 6 per active parameter and token, and 12 L S Q per token of attention."""
    attention = 12 * model.num_hidden_layers * length * model.num_attention_heads * model.head_dim
    dense, experts, router = parameters(model)
    active = dense + router + experts * model.routes_per_token / model.num_experts
    return tokens * (6 * active + attention)


def bytes_sent(model: ModelConfig, layout: Layout, gpus: int, tokens: int, width: int = 2) -> dict[str, float]:
    """Bytes that a device sends in a step, by purpose; of rows as if every process' experts got equally many."""
    dense, experts, _ = parameters(model)
    layers, away = model.num_hidden_layers, (layout.experts - 1) / layout.experts
    rows = layers * tokens * model.routes_per_token * away
    return {
        "gradients": _ring(4 * dense, gpus),
        "gradients of experts": _ring(4 * experts / layout.experts, gpus // layout.experts),
        "gradient of the router": _ring(4 * layers * model.hidden_size * model.num_experts, gpus),
        "rows of experts": 4 * width * rows * model.hidden_size,
        "surprise of rows": 4 * rows,
    }


def communication_of(
    model: ModelConfig, cluster: Cluster, layout: Layout, gpus: int, tokens: int, width: int = 2
) -> float:
    """Seconds of a device's messages, one after another.

    A ring is as fast as its slowest link. An exchange is as slow as the slower of its parts: to the X' devices of the
    same machine, and to the others. Each layer has four, two forward and two backward.
    """
    sent = bytes_sent(model, layout, gpus, tokens, width)
    link = (cluster.intra_gb_s if gpus <= cluster.gpus_per_node else cluster.inter_gb_s) * 1e9
    messages = 2 * (gpus - 1) * 2 + 2 * (gpus // layout.experts - 1)
    rings = sum(sent[key] for key in ("gradients", "gradients of experts", "gradient of the router")) / link
    near = min(layout.experts, cluster.gpus_per_node)
    rows = sent["rows of experts"] + sent["surprise of rows"]
    others = max(1, layout.experts - 1)
    exchange = max(
        rows * (near - 1) / others / (cluster.intra_gb_s * 1e9),
        rows * (layout.experts - near) / others / (cluster.inter_gb_s * 1e9),
    )
    messages += 4 * model.num_hidden_layers * (layout.experts - 1)
    return rings + exchange + messages * cluster.latency_us * 1e-6


def layouts_of(model: ModelConfig, gpus: int) -> list[Layout]:
    """All layouts of so many devices: X a divisor of both, optimizer states shared or not."""
    most = min(gpus, model.num_experts)
    divisors = [x for x in range(1, most + 1) if gpus % x == 0 and model.num_experts % x == 0]
    return [Layout(x, shard) for x in divisors for shard in ((False, True) if gpus > 1 else (False,))]


def _shares(model: ModelConfig, layout: Layout, gpus: int) -> tuple[float, float]:
    """Fast parameters, beside the experts and of them, that a device updates."""
    dense, experts, _ = parameters(model)
    return (dense / gpus, experts / gpus) if layout.shard_optimizer else (dense, experts / layout.experts)


def _ring(nbytes: float, members: int) -> float:
    return 2 * (members - 1) / members * nbytes


def _require(fine: bool, key: str, wanted: str, came: object) -> None:
    if not fine:
        raise UserError(f"{key}: expected {wanted}, got {came}")
