"""Experts that get no tokens begin anew as copies of the busiest ones."""

from typing import Any

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.ops import as_scalar, as_wide_as
from tiny_onn_func.tree import Tree
from training.step.counter_rng import Purpose, random_normal
from training.step.hyper_params import HyperParams, Number
from training.step.optim import AdamWState

MATRICES = ("w1", "w2", "w3")


def regenerate(
    params: Tree,
    expert_opt: AdamWState,
    router_opt: AdamWState,
    step: Tensor,
    *,
    load: Float[Tensor, "*runs layers experts"],
    hyper: HyperParams,
    router_learns: Number,
) -> dict[str, Any]:
    """The fields of a TrainState in which starved experts are replaced.

    An expert starves when its w2's mean squared gradient, as AdamW remembers it, is below `regenerate_below` times the
    mean of its layer: one without tokens falls to 1 % of it in ln 100 / (1 - beta2) steps. It becomes a copy of the
    layer's busiest expert, which itself never starves; its router column is the busiest one's turned aside by noise of
    the matrix's own size, so that the two share tokens. Its first moments start at zero and its second moments are
    those of its source: with zeros it would starve again by definition. Nothing happens in the first 1 / (1 - beta2)
    steps. A router that does not learn, `router_learns` being 0 (its rate is 0, or it is frozen), keeps its columns.
    """
    moe = params["layers"]["moe"]
    squares = reduce(expert_opt.nu["layers"]["moe"]["w2"], "... experts inner dim -> ... experts", "mean")
    floor = as_wide_as(squares, hyper.regenerate_below) * squares.mean(dim=-1, keepdim=True)
    source = load.argmax(dim=-1)
    others = torch.arange(load.shape[-1], device=load.device) != source.unsqueeze(-1)
    starved = (squares < floor) & as_wide_as(squares, step * (1 - hyper.beta2) > 1) & others

    def replaced(tree: Tree, factor: float, **more: Tensor) -> Tree:
        own = tree["layers"]["moe"]
        new = {name: _take(own[name], source, starved, factor) for name in MATRICES}
        return {**tree, "layers": {**tree["layers"], "moe": {**own, **new, **more}}}

    router = moe["router"]
    noise = random_normal(hyper.explore_seed, step, Purpose.REGENERATE, *router.shape[-3:]).to(router.dtype)
    size = router.square().mean(dim=(-3, -2, -1), keepdim=True).sqrt()
    aside = _by_expert(router, source) + noise * size
    learns = as_scalar(router_learns, router.device) > 0
    column = starved.unsqueeze(-2) & as_wide_as(router, learns)
    moments = router_opt.mu["router"], router_opt.nu["router"]
    return {
        "params": replaced(params, 1.0, router=torch.where(column, aside, router)),
        "expert_opt": expert_opt._replace(mu=replaced(expert_opt.mu, 0.0), nu=replaced(expert_opt.nu, 1.0)),
        "router_opt": router_opt._replace(
            mu={**router_opt.mu, "router": torch.where(column, 0.0, moments[0])},
            nu={**router_opt.nu, "router": torch.where(column, _by_expert(moments[1], source), moments[1])},
        ),
    }


def _take(
    leaf: Float[Tensor, "*runs layers experts a b"], source: Int[Tensor, "*runs layers"], starved: Tensor, factor: float
) -> Tensor:
    """Starved experts' matrices replaced by `factor` times their layer's source."""
    index = source[..., None, None, None].expand(*source.shape, 1, *leaf.shape[-2:])
    return torch.where(starved[..., None, None], leaf.gather(-3, index) * factor, leaf)


def _by_expert(
    router: Float[Tensor, "*runs layers dim experts"], source: Int[Tensor, "*runs layers"]
) -> Float[Tensor, "*runs layers dim 1"]:
    """The source's column of each layer."""
    index = source[..., None, None].expand(*source.shape, router.shape[-2], 1)
    return router.gather(-1, index)
