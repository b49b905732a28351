"""The compiled kernels beside PyTorch's: products of rows and experts beside `grouped_mm`, projections beside `matmul`,
attention beside its own.

python -m benchmarks.speed.kernels [--repetitions N] [--threads N] [--json FILE]
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import arguments, interleaved, table, write_json
from tiny_onn_func.attention import attend, causal_bias
from tiny_onn_func.kernels import forward as forward_kernels

Subject = Callable[[], object]
PRODUCTS = ((8192, 32, 256, 128), (3072, 16, 128, 128), (8192, 512, 128, 32), (8192, 512, 16, 128), (4096, 128, 32, 32))
PROJECTIONS = ((1, 768, 128, 256), (1, 768, 128, 257), (1, 1024, 256, 512), (16, 512, 64, 128))
HEADS = {"A": (12, 2, 2, 64, 32), "B": (8, 2, 2, 128, 64), "16 runs of w64": (128, 1, 2, 64, 32)}


def main() -> None:
    args = arguments(__doc__, 31)
    results = {}
    for sizes in PRODUCTS:
        title = "{} rows of {} experts, {} x {}".format(*sizes)
        results[title] = interleaved(products(*sizes), args.repetitions)
        print(table(title, results[title], "product"), flush=True)
    for shape in PROJECTIONS:
        title = "{} runs of {} rows, {} x {}".format(*shape)
        results[title] = interleaved(projections(*shape), args.repetitions)
        print(table(title, results[title], "product"), flush=True)
    for name, heads in HEADS.items():
        results[name] = interleaved(attentions(*heads), args.repetitions)
        print(table(f"attention, {name}", results[name], "kernel"), flush=True)
    if args.json:
        write_json(args.json, results)


def products(rows: int, experts: int, inner: int, outer: int) -> dict[str, Subject]:
    """Ours and the library's, with rows spread at random."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(0, experts, (rows,), generator=generator), minlength=experts)
    offsets = counts.cumsum(0).to(torch.int32)
    x, grad, w = torch.randn(rows, inner), torch.randn(rows, outer), torch.randn(experts, inner, outer)
    run_offsets = offsets[None]
    return {
        "product": lambda: forward_kernels.matmul([(x[None], w[None])], run_offsets),
        "product, grouped_mm": lambda: F.grouped_mm(x, w, offs=offsets),
        "transposed": lambda: forward_kernels.matmul([(grad[None], w[None].mT)], run_offsets),
        "transposed, grouped_mm": lambda: F.grouped_mm(grad, w.mT, offs=offsets),
        "outer": lambda: forward_kernels.outer(x[None], grad[None], run_offsets),
        "outer, grouped_mm": lambda: F.grouped_mm(x.mT, grad, offs=offsets),
    }


def projections(runs: int, rows: int, inner: int, outer: int) -> dict[str, Subject]:
    """One matrix a run, as groups of one: forward, and both gradients."""
    x, grad, w = torch.randn(runs, rows, inner), torch.randn(runs, rows, outer), torch.randn(runs, inner, outer)
    ends, group = torch.full((runs, 1), rows, dtype=torch.int32), w.unsqueeze(1)
    return {
        "product": lambda: forward_kernels.matmul([(x, group)], ends),
        "product, matmul": lambda: x @ w,
        "transposed": lambda: forward_kernels.matmul([(grad, group.mT)], ends),
        "transposed, matmul": lambda: grad @ w.mT,
        "outer": lambda: forward_kernels.outer(x, grad, ends),
        "outer, matmul": lambda: x.mT @ grad,
    }


def attentions(batch: int, groups: int, share: int, seq: int, dim: int) -> dict[str, Subject]:
    """Forward and backward: the kernel, and the library's fused one."""
    q = torch.randn(batch, groups, share, seq, dim, requires_grad=True)
    k, v = (torch.randn(batch, groups, seq, dim, requires_grad=True) for _ in range(2))
    bias, upstream = (
        causal_bias(None, seq, torch.device("cpu"), torch.float32),
        torch.randn(batch, seq, groups, share, dim),
    )

    theirs = upstream.movedim(1, 3).flatten(1, 2)

    def library() -> object:
        keys, values = (t.repeat_interleave(share, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q.flatten(1, 2), keys, values, is_causal=True, scale=1.0)
        return torch.autograd.grad(out, (q, k, v), theirs)

    return {
        "kernel": lambda: torch.autograd.grad(attend(q, k, v, bias), (q, k, v), upstream),
        "scaled_dot_product_attention": library,
    }


if __name__ == "__main__":
    main()
