"""A valid call of every kernel's wrapper, to be spoiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import seeded
from tiny_onn_func import ModelConfig, init_params
from tiny_onn_func.kernels import decoder, forward, step, update
from tiny_onn_func.tree import flatten


class Call(NamedTuple):
    function: Callable[..., Any]  # of the tensors, by name
    tensors: dict[str, Tensor]
    indices: dict[str, int]  # bounds of those that are used as such


class Sizes(NamedTuple):
    runs: int = 1
    tokens: int = 5
    dim: int = 3
    inner: int = 4
    experts: int = 3
    slots: int = 2
    batch: int = 2
    groups: int = 1
    share: int = 2


def a_pass(sizes: Sizes, generator: torch.Generator) -> Call:
    """Loss, gradients and surprise of a model of these sizes."""
    runs, tokens, dim, inner, experts, slots, batch, groups, share = sizes
    vocab, head = 7, 2 * dim
    config = ModelConfig(
        vocab_size=vocab, hidden_size=dim, num_hidden_layers=2, num_attention_heads=groups * share,
        num_key_value_heads=groups, head_dim=head, moe_intermediate_size=inner, num_experts=experts,
        max_experts_per_tok=slots, tie_word_embeddings=False,
    )  # fmt: skip
    params = [init_params(config, generator) for _ in range(runs)]
    leaves = {name.rpartition(".")[2]: name for name in flatten(params[0])}
    drawn = {short: torch.stack([flatten(tree)[name] for tree in params]) for short, name in leaves.items()}
    ids, labels = (torch.randint(vocab, (runs, batch, tokens), generator=generator) for _ in range(2))
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones(1, batch, tokens, dtype=torch.int64)}
    rotary = {name: torch.randn(tokens, head, generator=generator) for name in ("cosines", "sines")}

    def function(cosines: Tensor, sines: Tensor, **t: Tensor) -> Any:
        named = {name: t.pop(short) for short, name in leaves.items()}
        return decoder.decoder_pass(named, **t, rotary=(cosines, sines), config=config, measured="norms")

    budgets = {"budgets": torch.rand(runs, generator=generator, dtype=torch.float64)}
    return Call(function, {**drawn, **inputs, **budgets, **rotary}, {"input_ids": vocab, "labels": vocab})


def a_finish(sizes: Sizes, generator: torch.Generator) -> Call:
    """Everything that follows a pass, with one leaf beside the router."""
    runs, tokens, dim, _, experts, slots, *_ = sizes
    layers, by_run = 2, (runs,)
    by_token = runs, layers, tokens

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def below(bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=generator)

    observed = {
        "surprise": drawn(*by_token, experts), "router_inputs": drawn(*by_token, dim),
        "router_logits": drawn(*by_token, experts), "expert_ids": below(experts, *by_token, slots),
        "active": drawn(*by_token, slots) < 0.7, "target": below(experts, *by_token),
        "informative": drawn(*by_token) < 0.7, "tied": drawn(*by_token) < 0.1, "real": drawn(runs, tokens) < 0.9,
        "loss_sum": drawn(*by_run), "entropy_sum": drawn(*by_run), "targets": below(9, *by_run),
        "correct": below(9, *by_run),
    }  # fmt: skip
    leaves = {name: drawn(runs, 3, dim) for name in ("params", "mu", "nu", "grads")}
    router = {f"router_{name}": drawn(runs, layers, dim, experts) for name in ("params", "mu", "nu")}
    counters = {name: below(9, *by_run) for name in ("step", "updates", "router_updates")}

    def function(**t: Tensor) -> Any:
        tree, own = ([{"leaf": t[f"{of}{name}"]} for name in ("params", "mu", "nu")] for of in ("", "router_"))
        return update.finish_step(
            update.Observed(*(t[name] for name in update.Observed._fields)), {"leaf": t["grads"]},
            update.Moments(*tree), update.Moments(*own), t["bias"], t["numbers"],
            (t["step"], t["updates"], t["router_updates"]), {"leaf": 3},
        )  # fmt: skip

    rest = {"bias": drawn(runs, layers, experts), "numbers": drawn(runs, len(update.NUMBERS)).double()}
    indices = {"target": experts, "expert_ids": experts}
    return Call(function, observed | leaves | router | counters | rest, indices)


def calls(sizes: Sizes = Sizes(), seed: int = 0) -> dict[str, Call]:  # noqa: B008
    runs, tokens, dim, inner, experts, slots, batch, groups, share = sizes
    rows, width, head = tokens * slots, groups * (share + 2), 2 * dim
    generator = seeded(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def below(bound: int, *shape: int) -> Tensor:
        return torch.randint(max(bound, 1), shape, generator=generator)

    def maybe(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.7

    ids = torch.rand(runs, tokens, experts, generator=generator).argsort(dim=-1)[..., :slots].contiguous()
    order, _, expert, offsets = forward.sort_rows(ids, maybe(runs, tokens, slots), experts)
    token, weights = order // max(slots, 1), drawn(runs, experts, dim, inner)
    by_token = {"target": below(experts, runs, 1, tokens), "informative": maybe(runs, 1, tokens)}
    taught = {"logits": drawn(runs, 1, tokens, experts), **by_token, "real": maybe(runs, tokens)}
    rotary = {"cosines": drawn(tokens, head), "sines": drawn(tokens, head)}
    heads = {"qkv": drawn(runs, batch, tokens, width, head), "norms": drawn(runs, width - groups, head), **rotary}
    by_head = (("q", groups * share), ("k", groups), ("v", groups))
    slopes = {n: drawn(runs, batch, count, tokens, head) for n, count in by_head}
    keys = {name: drawn(batch, groups, tokens, dim) for name in "kv"}
    attended = {"q": drawn(batch, groups, share, tokens, dim), **keys, "bias": drawn(1, tokens, tokens)}
    out = {"out": drawn(batch, tokens, groups, share, dim), "log_sums": drawn(batch, groups, share, tokens)}
    labelled = {"logits": drawn(tokens, inner), "labels": below(inner, tokens)}
    leaves = {name: drawn(runs, dim).abs() for name in ("params", "grads", "mu", "nu")}
    normed = {"x": drawn(runs, tokens, dim), "weight": drawn(runs, dim)}
    gated = {"gate": drawn(tokens, inner), "up": drawn(tokens, inner)}
    sent = {"weights": drawn(tokens, slots)}
    choice = {"logits": drawn(runs, tokens, experts), "bias": drawn(runs, experts)}
    budget = {"budgets": torch.rand(runs, generator=generator, dtype=torch.float64), "real": maybe(runs, tokens)}
    grouped = {"token": token, "offsets": offsets}
    routed = {"expert_ids": ids.unsqueeze(1), "active": maybe(runs, 1, tokens, slots)}
    surprise, least = drawn(runs, 1, tokens, experts).abs(), torch.ones(runs)
    spread = {"left": drawn(runs, rows, dim), "right": drawn(runs, rows, inner), "token": token, "expert": expert}
    sums = {"picked": drawn(runs, 1), "mass": drawn(runs, 1, experts), "squares": drawn(runs, 1)}
    numbers, ends = torch.full((runs, 6), 0.1), {"offsets": rows + 1}
    some = min(runs, tokens, batch, slots, experts) > 0  # a pass or a step of nothing is refused
    whole = {"decoder_pass": a_pass(sizes, generator), "finish_step": a_finish(sizes, generator)} if some else {}
    return whole | {
        "grouped_matmul": Call(
            lambda rows, weights, offsets: forward.matmul([(rows, weights)], offsets),
            {"rows": drawn(runs, rows, dim), "weights": weights, "offsets": offsets}, ends,
        ),
        "grouped_matmul, transposed": Call(
            lambda rows, weights, offsets: forward.matmul([(rows, weights), (rows, weights)], offsets),
            {"rows": drawn(runs, rows, dim), "weights": weights.mT.contiguous().mT, "offsets": offsets}, ends,
        ),
        "grouped_outer": Call(
            forward.outer,
            {"rows": drawn(runs, rows, dim), "grads": drawn(runs, rows, inner), "offsets": offsets}, ends,
        ),
        "grouped_matmul of tokens": Call(
            forward.token_matmul,
            {"x": drawn(runs, tokens, dim), "weights": weights, **grouped}, {"token": tokens, **ends},
        ),
        "grouped_outer of tokens": Call(
            forward.token_outer,
            {"x": drawn(runs, tokens, dim), "grads": drawn(runs, rows, inner), **grouped}, {"token": tokens, **ends},
        ),
        "swiglu": Call(forward.swiglu, gated, {}),
        "swiglu_grad": Call(forward.swiglu_grad, {"grad": drawn(tokens, inner), **gated}, {}),
        "scaled_rows": Call(
            forward.scaled_rows, {"x": drawn(tokens, dim), **sent, "order": below(rows, rows)}, {"order": rows}
        ),
        "combined_rows": Call(
            forward.combined_rows, {"y": drawn(rows, dim), **sent, "inverse": below(rows, rows)}, {"inverse": rows}
        ),
        "sort_rows": Call(
            lambda expert_ids, active: forward.sort_rows(expert_ids, active, experts),
            {"expert_ids": ids, "active": maybe(runs, tokens, slots)}, {"expert_ids": experts},
        ),
        "rms_norm": Call(lambda **t: forward.rms_norm(**t, eps=1e-6), normed, {}),
        "rms_norm_grad": Call(
            lambda **t: forward.rms_norm_grad(**t, eps=1e-6), {"grad": drawn(runs, tokens, dim), **normed}, {}
        ),
        "split_heads": Call(lambda **t: forward.split_heads(**t, eps=1e-6), heads, {}),
        "split_heads_grad": Call(
            lambda q, k, v, **t: forward.split_heads_grad((q, k, v), **t, eps=1e-6), {**slopes, **heads}, {}
        ),
        "attention": Call(forward.attention, attended, {}),
        "attention_grad": Call(
            forward.attention_grad, {**attended, **out, "grad": drawn(batch, tokens, groups, share, dim)}, {}
        ),
        "choose": Call(
            lambda **t: forward.choose(**t, slots=slots, least=1, dynamic=True), {**choice, **budget}, {}
        ),
        "cross_entropy": Call(step.cross_entropy, labelled, {"labels": inner}),
        "cross_entropy_grad": Call(
            step.cross_entropy_grad,
            {"grads": drawn(tokens), **labelled, "best": below(inner, tokens), "log_sums": drawn(tokens)},
            {"labels": inner, "best": inner},
        ),
        "adamw": Call(
            lambda **t: step.adamw(**{name: [x] for name, x in t.items()}), {"numbers": numbers, **leaves}, {}
        ),
        "spread_surprise": Call(
            lambda **t: step.spread_surprise(**t, tokens=tokens, experts=experts, is_signed=False), spread,
            {"token": tokens, "expert": experts + 1},
        ),
        "least_surprised": Call(
            step.least_surprised,
            {"surprise": surprise, "real": maybe(runs, tokens), "least": least, "sign": torch.ones(runs)}, {},
        ),
        "router_sums": Call(step.router_sums, taught, {"target": experts}),
        "router_sums_grad": Call(
            lambda picked, mass, squares, **t: step.router_sums_grad((picked, mass, squares), **t), {**sums, **taught},
            {"target": experts},
        ),
        "routing_sums": Call(
            step.routing_sums, {**taught, "surprise": surprise, **routed, "tied": maybe(runs, 1, tokens)},
            {"target": experts, "expert_ids": experts},
        ),
    }  # fmt: skip
