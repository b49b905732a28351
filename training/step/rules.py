"""Rules: from a step's surprise to the router's targets, as pairs of pure functions like optax's transforms.

    rule = Rule(init, update)
    state = init_state(config, generator, rule=rule)
    state, metrics = hyper_step(state, batch, hyper, config, rule=rule)

`init(config)` makes the rule's own state, a tree of tensors that may be empty; it travels in `TrainState.rule`, and is
checkpointed, mapped and distributed like the rest. `update` sees one run at a time and must be safe under vmap: no
`.item()`, no boolean indexing, no `if` on a tensor.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.checks import check_indices
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import as_scalar, as_wide_as
from tiny_onn_func.primitives.fused import Values, fused
from tiny_onn_func.primitives.vmap import each_run
from tiny_onn_func.tree import walk
from training.step.batch import Batch
from training.step.counter_rng import Purpose, random_words
from training.step.hyper_params import HyperParams, Number, is_off
from training.step.surprise import divide_by_expert_mean


class Targets(NamedTuple):
    """Training targets of the router, one a layer and token."""

    expert: Int[Tensor, "*runs layers tokens"]  # int64 in [0, experts) where the token teaches
    informative: Bool[Tensor, "*runs layers tokens"]  # True where the token teaches the router
    tied: Bool[Tensor, "*runs layers tokens"] | None = None  # real, with candidates enough, all of them equal; None: no
    shares: Float[Tensor, "*runs layers tokens experts"] | None = None  # soft targets; None puts all on `expert`


def router_targets(
    per_token_surprise: Float[Tensor, "*runs layers tokens experts"],
    real: Bool[Tensor, "*#runs tokens"],
    min_candidates: Number,
    sign: Number = 1.0,
    temperature: Number = 0.0,
) -> Targets:
    """target = argmin of sign * surprise over the routed experts; with a temperature, shares of all of them.

    shares = softmax(-sign * surprise / (temperature * the token's mean |surprise|)): no unit, so no layer is special.

    A token teaches iff it is real, has at least `min_candidates` routed experts, and they are not all tied: the argmin
    of a token without gradient (surprise 0 everywhere) would quietly favour the first expert. Tied means equal within
    TIE_TOLERANCE of the larger size, as rounding must not teach; what is below the smallest normal number counts as 0.
    A lone candidate, allowed by min_candidates = 1, is not a tie.
    """
    runs, numbers = per_token_surprise.shape[:-3], (min_candidates, sign)  # a kernel reads one of each run
    least, side = (as_scalar(n, real.device, torch.float32).expand(runs) for n in numbers)
    real = real.expand(*runs, -1)
    expert, informative, tied = ARGMIN_TARGETS(per_token_surprise, real, least, side)
    if is_off(temperature):
        return Targets(expert, informative, tied, None)
    finite = per_token_surprise.isfinite()
    signed = torch.where(finite, per_token_surprise * as_wide_as(finite, sign), torch.inf)
    size = torch.where(finite, per_token_surprise.abs(), 0.0).sum(dim=-1) / finite.sum(dim=-1).clamp_min(1)
    temperature = temperature.to(size.dtype) if isinstance(temperature, Tensor) else temperature
    width = as_wide_as(size, temperature) * torch.where(informative, size, 1.0)
    width = width.clamp_min(torch.finfo(size.dtype).tiny)
    below = torch.where(finite & informative.unsqueeze(-1), signed.amin(dim=-1, keepdim=True) - signed, -torch.inf)
    hard = torch.zeros_like(signed).scatter(-1, expert.unsqueeze(-1), 1.0)
    soft = torch.where(informative.unsqueeze(-1), below / width.unsqueeze(-1), 0.0).softmax(dim=-1)
    is_soft = as_wide_as(soft, as_scalar(temperature, soft.device)) > 0
    return Targets(expert, informative, tied, torch.where(is_soft, soft, hard))


def _argmin_targets(surprise: Tensor, real: Tensor, least: Tensor, sign: Tensor) -> Values:
    """(expert, informative, tied)."""
    finite = surprise.isfinite()
    size = torch.where(
        surprise.abs() < torch.finfo(surprise.dtype).tiny, 0.0, surprise
    )  # no gradient, but for rounding
    signed = torch.where(finite, size * sign[..., None, None, None], torch.inf)
    lowest = signed.amin(dim=-1)
    highest = torch.where(finite, signed, -torch.inf).amax(dim=-1)
    candidates = finite.sum(dim=-1)
    eligible = real.unsqueeze(-2) & (candidates >= least[..., None, None]) & (candidates >= 1)
    gap = step_kernels.TIE_TOLERANCE * torch.maximum(lowest.abs(), highest.abs())
    tied = eligible & (candidates > 1) & (highest - lowest <= gap)
    return signed.argmin(dim=-1), eligible & ~tied, tied


ARGMIN_TARGETS = fused(
    reference=_argmin_targets, kernel=step_kernels.least_surprised, dims=(3, 1, 0, 0), out_dims=(2, 2, 2)
)


def shuffled(targets: Targets, words: Int[Tensor, "*runs layers tokens"], switch: Number) -> Targets:
    """With a switch of 1, the targets of each layer's informative tokens dealt out anew among those tokens.

    Args:
        words: random numbers, less than 2**32; their order is the order of dealing.
    """
    behind = 1 << 33  # tokens that do not teach keep their places at the end
    places = torch.arange(words.shape[-1], device=words.device).expand_as(words)
    from_place = torch.where(targets.informative, places, places + behind).argsort(dim=-1)
    to_place = torch.where(targets.informative, words, places + behind).argsort(dim=-1)
    dealt = torch.zeros_like(targets.expert).scatter(-1, to_place, targets.expert.gather(-1, from_place))
    on = as_wide_as(words, as_scalar(switch, words.device) > 0)
    shares = targets.shares
    if shares is not None:
        wide = from_place.unsqueeze(-1).expand_as(shares), to_place.unsqueeze(-1).expand_as(shares)
        dealt_shares = torch.zeros_like(shares).scatter(-2, wide[1], shares.gather(-2, wide[0]))
        shares = torch.where(on.unsqueeze(-1), dealt_shares, shares)
    return targets._replace(expert=torch.where(on, dealt, targets.expert), shares=shares)


# Rules ----------------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Rule that turns a step's surprise into the router's targets.

    Args:
        init: (config) -> the rule's state, a tree of tensors.
        update: (rule state, surprise (L, T, E), trace, batch, hyper, step) -> (rule state, Targets). Surprise is +inf
            where a token did not go; `trace` has leading axes (L, T), `batch` (B, S) with T = B * S.
        takes_runs: whether `update` takes tensors with leading axes of runs; else it is mapped over them.
    """

    init: Callable[[ModelConfig], Any]
    update: Callable[[Any, Tensor, RouterTrace, Batch, HyperParams, Tensor], tuple[Any, Targets]]
    takes_runs: bool = False


def apply_rule(
    rule: Rule, state: Any, surprise: Tensor, trace: RouterTrace, batch: Batch, hyper: HyperParams, step: Tensor
) -> tuple[Any, Targets]:
    """The rule's update, of one run or of several in front.

    Raises:
        ValueError: targets or a state of other shapes or dtypes than they must have.
        IndexError: a target that is no expert, of a token that teaches.
    """
    inputs = state, surprise, trace, batch, hyper, step
    if rule is LEAST_SURPRISE:  # ours, and tested
        return rule.update(*inputs)
    new, targets = rule.update(*inputs) if rule.takes_runs else _of_each_run(rule, inputs, step.ndim)
    dtypes = {"expert": torch.int64, "shares": surprise.dtype}
    for name, value in targets._asdict().items():
        if value is not None:
            dtype, shape = dtypes.get(name, torch.bool), surprise.shape if name == "shares" else surprise.shape[:-1]
            if value.shape != shape:
                raise ValueError(f"rule: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")
            if value.dtype != dtype:
                raise ValueError(f"rule: expected {name} of {dtype}, got {value.dtype}")
    expert = torch.where(targets.informative, targets.expert, 0)
    check_indices("rule: expert", expert, 0, surprise.shape[-1])
    shapes = [{name: (leaf.shape, leaf.dtype) for name, leaf in walk(tree)} for tree in (state, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"rule: expected a state of the form of init's, {shapes[0]}, got {shapes[1]}")
    return new, targets._replace(expert=expert)


def _of_each_run(rule: Rule, inputs: Any, runs: int) -> tuple[Any, Targets]:

    def present(inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        new, targets = rule.update(*inputs)
        return new, {name: value for name, value in targets._asdict().items() if value is not None}

    new, fields = each_run(present, inputs, runs)
    return new, Targets(**fields)


def _least_surprise(
    state: Any, surprise: Tensor, trace: RouterTrace, batch: Batch, hyper: HyperParams, step: Tensor
) -> tuple[Any, Targets]:
    if not is_off(hyper.expert_norm):
        surprise = divide_by_expert_mean(surprise, hyper.expert_norm)
    real = rearrange(batch.attention_mask != 0, "... b s -> ... (b s)")
    targets = router_targets(surprise, real, hyper.min_candidates, hyper.surprise_sign, hyper.target_temperature)
    if is_off(hyper.shuffle_targets):
        return state, targets
    words = random_words(hyper.explore_seed, step, Purpose.SHUFFLE, *targets.expert.shape[-2:])
    return state, shuffled(targets, words, hyper.shuffle_targets)


LEAST_SURPRISE = Rule(lambda config: (), _least_surprise, takes_runs=True)
RULES: Mapping[str, Rule] = {"least surprise": LEAST_SURPRISE}
