"""HyperParams: the numbers of a run, every one of which may be mapped by vmap."""

import ast
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

Number = int | float | Tensor  # a Python number, or a 0-d tensor when mapped


class HyperParams(NamedTuple):
    """Numbers that a hyper step reads. Router rules are coefficients, so different rules are runs of one vmap.

    A coefficient that is the Python number 0 switches its term off for good (it costs nothing); a 0-d tensor of
    value 0 computes the term and multiplies it by zero.

    These defaults are those of a bare hyper step. A run of `tiny-onn train` has others for lr, warmup_steps,
    balance_weight, total_steps and decay_steps, which its --help shows.
    """

    lr: Number = 3e-3
    """AdamW learning rate of the fast system (everything but the router)."""
    router_lr: Number = 1e-3
    """AdamW learning rate of the router; 0 freezes it."""
    backbone_lr_scale: Number = 1.0
    """Share of `lr` for what is neither expert nor router: embedding, attention, norms, head; 0 freezes it."""
    weight_decay: Number = 0.1
    """Decoupled weight decay of the matrices of the fast system; the router has none."""
    beta1: Number = 0.9
    """AdamW: decay of the first moment."""
    beta2: Number = 0.99
    """AdamW: decay of the second moment."""
    eps: Number = 1e-8
    """AdamW: term added to the denominator."""
    max_grad_norm: Number = 1.0
    """Global norm to which each system's gradient is clipped."""
    warmup_steps: Number = 0
    """Steps over which both learning rates rise linearly from zero."""
    total_steps: Number = 0
    """Step at which the decay ends; 0 keeps the learning rates constant."""
    decay_steps: Number = 0
    """Steps before `total_steps` over which the rates fall linearly, constant until then (WSD, arXiv 2404.06395); 0
    lets them fall by a cosine from the end of the warm-up on."""
    min_lr_ratio: Number = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""
    distill_alpha: Number = 0.0
    """Weight of the teacher in the main loss: (1 - alpha) * cross entropy + alpha * temperature^2 * KL."""
    distill_temperature: Number = 1.0
    """Divides both models' logits before they are compared."""
    pi_alpha: Number = 0.5
    """Surprise budget of dynamic K, in (0, 1], and the steepness of predictive integrity."""
    pi_gamma: Number = 0.1
    """Weight of surprise in predictive integrity."""
    min_candidates: Number = 2
    """Fewest routed experts with which a token may teach the router."""
    surprise_weight: Number = 1.0
    """Weight of the surprise loss."""
    surprise_sign: Number = 1.0
    """+1 sends tokens to the least surprised expert, -1 to the most surprised one."""
    surprise_until: Number = 0
    """Step at which `surprise_weight`, falling linearly from the first step on, is zero; 0 keeps it as it is."""
    target_temperature: Number = 0.0
    """Softness of the target: softmax(-surprise / (temperature * the token's mean)); 0 is the least one alone."""
    expert_norm: Number = 0.0
    """Exponent of the expert's mean surprise, by which values are divided before they are compared; 1 is the mean."""
    shuffle_targets: Number = 0
    """1 deals the targets of a layer out anew among its tokens: the control with the same marginals, no content."""
    balance_weight: Number = 0.0
    """Weight of the load-balance loss (Switch Transformer, per layer, padding excluded)."""
    z_weight: Number = 0.0
    """Weight of the router z-loss (ST-MoE)."""
    router_coupling: Number = 0.0
    """Share of the main loss's gradient that reaches the router; 1 is the standard top-k router. Below 1 slopes through
    several steps, such as d(next loss)/d(lr), lack the part that goes through the router."""
    bias_speed: Number = 0.0
    """Step of the selection bias (loss-free balancing, arXiv 2408.15664)."""
    explore_prob: Number = 0.0
    """Probability that a token also tries a random expert in a layer."""
    explore_seed: Number = 0
    """Seed of exploration, shuffling and regeneration."""
    freeze_step: Number = 0
    """Step from which the router and its bias stay as they are; 0 is never."""
    regenerate_below: Number = 0.0
    """An expert whose mean squared gradient (AdamW's nu) is below this share of its layer's mean becomes a copy of the
    busiest expert, with fresh optimizer state; 0 is never."""


def field_texts(kind: type) -> dict[str, str]:
    """Map each field to the text below it in the source of its class."""
    body = getattr(ast.parse(inspect.getsource(kind)).body[0], "body", [])
    return {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


for _name, _text in field_texts(HyperParams).items():  # for help(), which says "Alias for field number 0" otherwise
    getattr(HyperParams, _name).__doc__ = _text

Range = tuple[str, Callable[[Any], bool], str]  # (what is wanted, whether a value is that, names of the fields)
RANGES: tuple[Range, ...] = (
    (
        "0 or more", lambda value: value >= 0,
        "lr router_lr backbone_lr_scale weight_decay warmup_steps pi_gamma surprise_weight surprise_until "
        "balance_weight z_weight bias_speed target_temperature expert_norm freeze_step",
    ),
    ("0 to 2**63 - 1", lambda value: 0 <= value < 2**63, "explore_seed"),
    ("more than 0", lambda value: value > 0, "eps max_grad_norm distill_temperature"),
    ("0 or more and less than 1", lambda value: 0 <= value < 1, "beta1 beta2 regenerate_below"),
    (
        "0 to 1", lambda value: 0 <= value <= 1,
        "min_lr_ratio router_coupling explore_prob shuffle_targets distill_alpha",
    ),
    ("more than 0 and at most 1", lambda value: 0 < value <= 1, "pi_alpha"),
    ("1 or more", lambda value: value >= 1, "min_candidates"),
    ("1 or -1", lambda value: value in (1, -1), "surprise_sign"),
)  # fmt: skip


def out_of_range(values: object, ranges: tuple[Range, ...]) -> str | None:
    """The first field whose Python number is out of its range, as "name: expected ..., got ..."; tensors pass."""
    for wanted, fits, names in ranges:
        for name in names.split():
            value = getattr(values, name)
            if value is not None and not isinstance(value, Tensor) and not fits(value):
                return f"{name}: expected {wanted}, got {value!r}"
    return None


def not_a_number(values: object) -> str | None:
    """The first coefficient that is neither a number nor a tensor, as "name: expected ..., got ..."."""
    if not isinstance(values, HyperParams):
        return f"expected HyperParams, got {type(values).__name__}; HyperParams(lr=1e-3) has all others, too"
    for name, value in zip(values._fields, values, strict=True):
        if not isinstance(value, Real | Tensor):
            return f"{name}: expected a number or a 0-d tensor, got {value!r}"
    return None


def with_axes(values: tuple[Number, ...], runs: Sequence[int] = ()) -> str | None:
    """The first field whose tensor has other axes than the runs', as "name: expected ..., got ..."."""
    for at, value in enumerate(values):
        if isinstance(value, Tensor) and value.ndim and value.shape != runs:
            name = values._fields[at]  # type: ignore[attr-defined]
            return f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}; map runs with vmap"
    return None


def is_off(coefficient: Number) -> bool:
    """True if a coefficient is the Python number 0, which switches its term off for good."""
    return isinstance(coefficient, float | int) and coefficient == 0
