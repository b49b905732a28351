"""One mixture-of-experts layer, forward and backward: against a dense layer of the same active size, and over T and E.

python -m benchmarks.speed.layer [--repetitions N] [--threads N] [--json FILE]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import arguments, interleaved, table, write_json
from tiny_onn_func import ModelConfig, init_params
from tiny_onn_func.decoder import unstack_layers
from tiny_onn_func.experts import apply_w2
from tiny_onn_func.moe import RoutingInputs, moe
from tiny_onn_func.ops import swiglu_reference

Subject = Callable[[], object]


def main() -> None:
    args = arguments(__doc__, 9)
    lengths, counts = (512, 2048, 8192), (8, 32, 128, 512)
    groups: dict[str, tuple[dict[str, Subject], str]] = {
        "T 2048, D 256, F 64, E 32, K 4": (beside_dense(2048, 256, 64, 32, 4), "dense"),
        "T 1024, D 128, F 16, E 512, K 8": (beside_dense(1024, 128, 16, 512, 8), "dense"),
        "over T (D 256, F 64, E 32, K 4)": ({f"T {t}": experts(t, 256, 64, 32, 4) for t in lengths}, "T 512"),
        "over E (T 1024, D 128, F 64, K 4)": ({f"E {e}": experts(1024, 128, 64, e, 4) for e in counts}, "E 8"),
    }
    results = {}
    for title, (subjects, to) in groups.items():
        results[title] = interleaved(subjects, args.repetitions)
        print(table(title, results[title], to), flush=True)
    if args.json:
        write_json(args.json, results)


def beside_dense(tokens: int, dim: int, inner: int, num_experts: int, top_k: int) -> dict[str, Subject]:
    return {"experts": experts(tokens, dim, inner, num_experts, top_k), "dense": dense(tokens, dim, inner * top_k)}


def experts(tokens: int, dim: int, inner: int, num_experts: int, top_k: int) -> Subject:
    """Gradients of a layer of experts in its matrices and its input; a fresh router, so the load is nearly even."""
    config = ModelConfig(257, dim, 1, 1, 1, dim, inner, num_experts, num_experts_per_tok=top_k)
    (layer,) = unstack_layers(init_params(config, torch.Generator().manual_seed(0))["layers"], 1)
    params = {name: leaf.clone().requires_grad_("router" not in name) for name, leaf in layer["moe"].items()}
    x, upstream = inputs(tokens, dim)
    routing = RoutingInputs(torch.ones(tokens, dtype=torch.bool), 0.5, 0.0, None)
    wanted = [x, params["w1"], params["w3"], params["w2"]]
    return lambda: torch.autograd.grad(moe(x, params, 0, routing, config, apply_w2)[0], wanted, upstream)


def dense(tokens: int, dim: int, inner: int) -> Subject:
    """Gradients of a plain SwiGLU."""
    w1, w3, w2 = ((torch.randn(shape) * 0.02).requires_grad_() for shape in ((dim, inner), (dim, inner), (inner, dim)))
    x, upstream = inputs(tokens, dim)
    return lambda: torch.autograd.grad(swiglu_reference(x @ w1, x @ w3) @ w2, [x, w1, w3, w2], upstream)


def inputs(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, dim, requires_grad=True), torch.randn(tokens, dim)


if __name__ == "__main__":
    main()
