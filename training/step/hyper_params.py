"""HyperParams: the numbers of a run, every one of which may be mapped by vmap."""

from collections.abc import Sequence
from numbers import Real
from typing import Annotated, NamedTuple

from torch import Tensor

from training.fields import show_in_help
from training.ranges import ABOVE_0, ABOVE_0_TO_1, BELOW_1, FROM_0, FROM_0_TO_1, FROM_1, SEED, SIGN, ranges_of

Number = int | float | Tensor  # a Python number, or a 0-d tensor when mapped


class HyperParams(NamedTuple):
    """Numbers that a hyper step reads. Router rules are coefficients, so different rules are runs of one vmap.

    A coefficient that is the Python number 0 switches its term off for good (it costs nothing); a 0-d tensor of
    value 0 computes the term and multiplies it by zero.

    These defaults are those of a bare hyper step. A run of `tiny-onn train` has others for lr, warmup_steps,
    balance_weight, total_steps and decay_steps, which its --help shows.
    """

    lr: Annotated[Number, FROM_0] = 3e-3
    """AdamW learning rate of the fast system (everything but the router)."""
    router_lr: Annotated[Number, FROM_0] = 1e-3
    """AdamW learning rate of the router; 0 freezes it."""
    backbone_lr_scale: Annotated[Number, FROM_0] = 1.0
    """Share of `lr` for what is neither expert nor router: embedding, attention, norms, head; 0 freezes it."""
    weight_decay: Annotated[Number, FROM_0] = 0.1
    """Decoupled weight decay of the matrices of the fast system; the router has none."""
    beta1: Annotated[Number, BELOW_1] = 0.9
    """AdamW: decay of the first moment."""
    beta2: Annotated[Number, BELOW_1] = 0.99
    """AdamW: decay of the second moment."""
    eps: Annotated[Number, ABOVE_0] = 1e-8
    """AdamW: term added to the denominator."""
    max_grad_norm: Annotated[Number, ABOVE_0] = 1.0
    """Global norm to which each system's gradient is clipped."""
    warmup_steps: Annotated[Number, FROM_0] = 0
    """Steps over which both learning rates rise linearly from zero."""
    total_steps: Annotated[Number, FROM_0] = 0
    """Step at which the decay ends; 0 keeps the learning rates constant."""
    decay_steps: Annotated[Number, FROM_0] = 0
    """Steps before `total_steps` over which the rates fall linearly, constant until then (WSD, arXiv 2404.06395); 0
    lets them fall by a cosine from the end of the warm-up on."""
    min_lr_ratio: Annotated[Number, FROM_0_TO_1] = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""
    distill_alpha: Annotated[Number, FROM_0_TO_1] = 0.0
    """Weight of the teacher in the main loss: (1 - alpha) * cross entropy + alpha * temperature^2 * KL."""
    distill_temperature: Annotated[Number, ABOVE_0] = 1.0
    """Divides both models' logits before they are compared."""
    pi_alpha: Annotated[Number, ABOVE_0_TO_1] = 0.5
    """Surprise budget of dynamic K, in (0, 1], and the steepness of predictive integrity."""
    pi_gamma: Annotated[Number, FROM_0] = 0.1
    """Weight of surprise in predictive integrity."""
    min_candidates: Annotated[Number, FROM_1] = 2
    """Fewest routed experts with which a token may teach the router."""
    surprise_weight: Annotated[Number, FROM_0] = 1.0
    """Weight of the surprise loss."""
    surprise_sign: Annotated[Number, SIGN] = 1.0
    """+1 sends tokens to the least surprised expert, -1 to the most surprised one."""
    surprise_until: Annotated[Number, FROM_0] = 0
    """Step at which `surprise_weight`, falling linearly from the first step on, is zero; 0 keeps it as it is."""
    target_temperature: Annotated[Number, FROM_0] = 0.0
    """Softness of the target: softmax(-surprise / (temperature * the token's mean)); 0 is the least one alone."""
    expert_norm: Annotated[Number, FROM_0] = 0.0
    """Exponent of the expert's mean surprise, by which values are divided before they are compared; 1 is the mean."""
    shuffle_targets: Annotated[Number, FROM_0_TO_1] = 0.0
    """1 deals the targets of a layer out anew among its tokens: the control with the same marginals, no content."""
    balance_weight: Annotated[Number, FROM_0] = 0.0
    """Weight of the load-balance loss (Switch Transformer, per layer, padding excluded)."""
    z_weight: Annotated[Number, FROM_0] = 0.0
    """Weight of the router z-loss (ST-MoE)."""
    router_coupling: Annotated[Number, FROM_0_TO_1] = 0.0
    """Share of the main loss's gradient that reaches the router; 1 is the standard top-k router. Below 1 slopes through
    several steps, such as d(next loss)/d(lr), lack the part that goes through the router."""
    bias_speed: Annotated[Number, FROM_0] = 0.0
    """Step of the selection bias (loss-free balancing, arXiv 2408.15664)."""
    quantile_balance: Annotated[Number, FROM_0_TO_1] = 0.0
    """Share by which the selection bias moves, each step, to the one with which every expert would have taken K / E of
    the step's tokens (quantile balancing, Kimi K3: 1); with `routing: thresholds` the rate at which the thresholds
    follow that quantile of the logits, in place of learning (expert threshold, arXiv 2603.11535: 0.01 or so)."""
    quantile_k: Annotated[Number, FROM_0] = 0.0
    """Experts of a token (K) that `quantile_balance` aims at; 0 is the K that was visited. Thresholds need one."""
    table_step: Annotated[Number, FROM_0] = 0
    """Step from which the table of `routing: stable` chooses; 0 is never."""
    table_memory: Annotated[Number, BELOW_1] = 0.99
    """Share of the counts in the table of `routing: stable` that is kept each step, until it chooses."""
    kmeans_rate: Annotated[Number, FROM_0_TO_1] = 0.01
    """Share by which the mean of `routing: kmeans` moves each step to the mean input of the expert's tokens."""
    default_memory: Annotated[Number, BELOW_1] = 0.9
    """Share of the mean outputs of `default_outputs` that is kept each step in which the expert has tokens."""
    explore_prob: Annotated[Number, FROM_0_TO_1] = 0.0
    """Probability that a token also tries a random expert in a layer."""
    explore_seed: Annotated[Number, SEED] = 0
    """Seed of exploration, shuffling and regeneration."""
    freeze_step: Annotated[Number, FROM_0] = 0
    """Step from which the router and its bias stay as they are; 0 is never."""
    regenerate_below: Annotated[Number, BELOW_1] = 0.0
    """An expert whose mean squared gradient (AdamW's nu) is below this share of its layer's mean becomes a copy of the
    busiest expert, with fresh optimizer state; 0 is never."""


show_in_help(HyperParams)
HyperParams.__new__.__annotations__ = dict.fromkeys(HyperParams._fields, Number)  # for help(): no ranges there
RANGES = ranges_of(HyperParams)


def not_a_number(values: object) -> str | None:
    """Error text for the first coefficient that is neither a number nor a tensor; None if all are right."""
    if not isinstance(values, HyperParams):
        return f"expected HyperParams, got {type(values).__name__}; HyperParams(lr=1e-3) has all others, too"
    for name, value in zip(values._fields, values, strict=True):
        if type(value) is not float and not isinstance(value, int | Tensor | Real):  # in the order of what is asked
            return f"{name}: expected a number or a 0-d tensor, got {value!r}"
    return None


def with_axes(values: tuple[Number, ...], runs: Sequence[int] = ()) -> str | None:
    """Error text for the first field whose tensor has other axes than the runs; None if all are right."""
    for at, value in enumerate(values):
        if isinstance(value, Tensor) and value.ndim and value.shape != runs:
            name = values._fields[at]  # type: ignore[attr-defined]
            return f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}; map runs with vmap"
    return None


def is_off(coefficient: Number) -> bool:
    """True if a coefficient is the Python number 0, which switches its term off for good."""
    return isinstance(coefficient, float | int) and coefficient == 0
