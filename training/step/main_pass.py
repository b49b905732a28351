"""The main loss: its gradient, and the values observed in the one forward and one backward pass through the model.

Gradients are torch.func's where derivatives are followed, plain autograd's where they are not; a test compares them.
torch.func wraps every tensor, and vmap dispatches every operation once more. Where nothing but vmap is at work the
objective gets the plain tensors inside, with an axis of runs in front, and one forward and one backward pass serve all
runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from tiny_onn_func.checks import check_shape
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.experts import Rows
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.primitives.vmap import each_run, is_wrapped, only_vmaps, outside_vmap_tree, unwrap
from tiny_onn_func.tree import Tree, leaves, merge, partition, tree_map
from training.step.batch import Batch, without_padding_labels
from training.step.counter_rng import random_exploration
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams, is_off
from training.step.losses import LanguageModelling, distillation, language_modelling
from training.step.one_kernel import kernel_pass, pass_is_one_kernel
from training.step.surprise import Kind, SurpriseKind, divide_by_weight, kind_of, nonfinite_surprise


class StepOptions(NamedTuple):
    """Static choices of a step: other code paths, so never mapped."""

    kind: SurpriseKind = "w2"
    compute_dtype: torch.dtype | None = None  # of everything but the router; None is the parameters' own


class PassResult(NamedTuple):
    """Outputs of one pass through the model, beside the gradient."""

    lm: LanguageModelling
    trace: RouterTrace
    per_token_surprise: Float[Tensor, "*runs layers tokens experts"]
    distill_sum: Tensor  # KL(teacher || student), nats, summed over targets
    expert_outputs: Any  # (L, E, D) outputs summed by expert where the configuration keeps their mean, else ()
    nonfinite: Tensor  # routed (layer, token, expert) whose measured surprise is NaN or infinite


class BatchShard(NamedTuple):
    """Position of these rows among the equal shards of a batch: random draws are those of the whole batch."""

    place: int = 0
    of: int = 1


class Hooks(Protocol):
    """Recorder of surprise during a pass: SurpriseHookManager, or one that moves rows between ranks."""

    @property
    def per_token_surprise(self) -> Tensor:
        """(..., L, T, E), filled in the backward pass."""

    def apply_w2(self, layer: int, hidden: Tensor, w2: Tensor, rows: Any) -> Tensor:
        """The hook point of w2."""

    def apply_w13(self, layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        """The hook point of gate and up."""


WHOLE = BatchShard()
HooksFactory = Callable[..., Hooks]  # (per_token_surprise, kind=kind) -> hooks


def main_gradients(
    fast: Tree,
    router: Tree,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    step: Tensor,
    options: StepOptions = StepOptions(),  # noqa: B008  a frozen value
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    *,
    shard: BatchShard = WHOLE,
    hooks_factory: HooksFactory = SurpriseHookManager,
) -> tuple[tuple[Tree, Tree | None], PassResult]:
    """Gradients of the summed main loss in (fast, router), and the other outputs of the pass.

    The router's is None unless `hyper.router_coupling` lets the main loss in.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("inference_mode: expected a step outside of it, as its tensors have no gradients; leave it")
    dtype = options.compute_dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"compute_dtype: expected a floating point torch.dtype or None, got {dtype!r}")
    batch = without_padding_labels(batch)
    if teacher_logits is not None:
        check_shape("teacher_logits", teacher_logits, (*batch.input_ids.shape, config.vocab_size))
        if not teacher_logits.is_floating_point():
            raise ValueError(f"teacher_logits: expected floating point numbers, got {teacher_logits.dtype}")
    if is_off(hyper.distill_alpha):  # a teacher without weight: the bits of a step without one
        teacher_logits = None
    kind, (layers, experts) = kind_of(options.kind), (config.num_hidden_layers, config.num_experts)
    tokens, explore = batch.input_ids.shape[-2:].numel(), None
    if not is_off(hyper.explore_prob):
        drawn = random_exploration(hyper.explore_seed, step, hyper.explore_prob, layers, tokens * shard.of, experts)
        explore = drawn[..., tokens * shard.place : tokens * (shard.place + 1)]

    whole = hooks_factory is SurpriseHookManager and teacher_logits is None and dtype is None and explore is None
    if whole and pass_is_one_kernel(fast, router, batch, hyper, config, kind):
        own, seen, trace = kernel_pass(fast, router, batch, hyper, config, kind)
        lm = LanguageModelling(seen.loss_sum, seen.targets, seen.correct, seen.entropy_sum)
        result = PassResult(lm, trace, seen.surprise, torch.zeros_like(seen.loss_sum), (), seen.nonfinite)
        run = merge(fast, router), batch, hyper, step, explore
        return (own, None), _with_kind(result, kind, run, config)

    def objective(fast: Tree, router: Tree, inputs: Any) -> tuple[Tensor, Any]:
        batch, hyper, explore, teacher_logits = inputs
        dtype = wide_dtype(fast["embed_tokens"].dtype)
        shape = *batch.input_ids.shape[:-2], layers, tokens, experts
        surprise = torch.full(shape, torch.inf, dtype=dtype, device=batch.input_ids.device)
        hooks = hooks_factory(_wrapped_like((fast, router, inputs), surprise), kind=options.kind)
        computed = (
            fast if options.compute_dtype is None else tree_map(lambda leaf: leaf.to(options.compute_dtype), fast)
        )
        outputs: list[Tensor] = []

        def summing(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
            y = hooks.apply_w2(layer, hidden, w2, rows)
            outputs.append(sum_by_expert(y.detach().to(dtype), rows, experts))
            return y

        logits, trace = forward(
            merge(computed, router), batch.input_ids, config, attention_mask=batch.attention_mask,
            surprise_budget=hyper.pi_alpha, apply_w2=summing if config.default_outputs else hooks.apply_w2,
            apply_w13=hooks.apply_w13,
            router_coupling=hyper.router_coupling, explore=explore,
        )  # fmt: skip
        lm = language_modelling(logits, batch.labels)
        total, kl = lm.loss_sum, torch.zeros_like(lm.loss_sum)
        if teacher_logits is not None and not is_off(hyper.distill_alpha):
            kl = distillation(logits, teacher_logits, batch.labels, hyper.distill_temperature)
            alpha = hyper.distill_alpha
            total = (1 - alpha) * total + alpha * hyper.distill_temperature**2 * kl
        return total.to(lm.loss_sum.dtype), (
            lm,
            trace,
            hooks.per_token_surprise,
            kl,
            torch.stack(outputs, dim=-3) if outputs else (),
        )

    inputs = batch, hyper, explore, teacher_logits
    if is_off(hyper.router_coupling):
        grads, observed = gradients(lambda fast, inputs: objective(fast, *inputs), (fast,), (router, inputs))
    else:
        grads, observed = gradients(objective, (fast, router), inputs)
    lm, trace, surprise, kl, outputs = observed
    nonfinite = nonfinite_surprise(surprise, trace.expert_ids, trace.active)
    result = PassResult(lm, trace, surprise, kl, outputs, nonfinite)
    run = merge(fast, router), batch, hyper, step, explore
    return (grads[0], grads[1] if len(grads) > 1 else None), _with_kind(result, kind, run, config)


def _with_kind(result: PassResult, kind: Kind, run: Any, config: ModelConfig) -> PassResult:
    """The result with surprise as its kind has it: sampled losses, or divided by the routing weight."""
    if (losses := kind.losses) is not None:
        surprise = each_run(lambda run: losses(run, config), run, run[3].ndim).to(result.per_token_surprise.dtype)
        nonfinite = surprise.isnan().sum(dim=(-3, -2, -1))  # +inf where no loss was sampled
        result = result._replace(per_token_surprise=surprise, nonfinite=nonfinite)
    if kind.divide_by_weight:
        trace = result.trace
        surprise = divide_by_weight(result.per_token_surprise, trace.expert_ids, trace.weights, trace.active)
        result = result._replace(per_token_surprise=surprise)
    return result


def sum_by_expert(y: Float[Tensor, "*runs rows dim"], rows: Rows, experts: int) -> Float[Tensor, "*runs experts dim"]:
    """The outputs of each expert's rows, added up."""
    place = rows.expert.unsqueeze(-1).expand_as(y)  # E, a spare one, on inactive rows
    empty = y.new_zeros((*y.shape[:-2], experts + 1, y.shape[-1]))
    return empty.scatter_add(-2, place, y)[..., :experts, :]


def per_token_surprise(
    params: Tree, batch: Batch, config: ModelConfig, hyper: HyperParams, *, kind: SurpriseKind = "w2"
) -> Float[Tensor, "layers tokens experts"]:
    """(L, B*S, E) surprise of every routed (layer, token, expert), +inf where a token did not go."""
    start = torch.zeros((), dtype=torch.int64, device=batch.input_ids.device)
    quiet = hyper._replace(explore_prob=0.0)
    return main_gradients(*partition(params), batch, quiet, config, start, StepOptions(kind))[1].per_token_surprise


def _wrapped_like(tree: Any, t: Tensor) -> Tensor:
    """The tensor, wrapped by every transform that wraps a leaf, as in-place writes need."""
    wrapped = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor) and is_wrapped(leaf)]
    zeros = [leaf.detach().new_zeros((), dtype=t.dtype) for leaf in wrapped]
    return t + torch.stack(zeros).sum() if zeros else t


Objective = Callable[..., tuple[Tensor, Any]]


def gradients(objective: Objective, trees: tuple[Any, ...], inputs: Any = ()) -> tuple[tuple[Any, ...], Any]:
    """(gradients of each tree, aux) of an objective `(*trees, inputs) -> (value, aux)`.

    Value and aux are those of one run, or of several, whose axis is then in front of every tensor of `trees`, `inputs`,
    value and aux. Whatever may be mapped or followed by somebody's derivative has to come in by `trees` or `inputs`.
    """
    if _is_followed((trees, inputs)):
        value, pull_back, aux = vjp(lambda *own: objective(*own, inputs), *trees, has_aux=True)  # type: ignore[misc]
        return pull_back(torch.ones_like(value), create_graph=True), aux

    def of_runs(both: tuple[Any, Any]) -> tuple[Any, Any]:
        trees, inputs = both
        with torch.enable_grad():
            own = tree_map(lambda leaf: leaf.detach().requires_grad_(), trees)
            value, aux = objective(*own, inputs)
            slopes = iter(torch.autograd.grad(value.sum(), leaves(own), materialize_grads=True))
        return tree_map(lambda _: next(slopes), trees), tree_map(lambda leaf: leaf.detach(), aux)

    return outside_vmap_tree(of_runs, (trees, inputs))


def _is_followed(trees: Any) -> bool:
    """True if a transform other than vmap, or autograd, may ask for gradients of the gradients."""
    return not only_vmaps() or any(unwrap(leaf)[0].requires_grad for leaf in leaves(trees) if isinstance(leaf, Tensor))
