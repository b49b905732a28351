"""The kernels of kernels.c, compiled for this very processor when they are first asked for, and kept for later runs.

Nothing needs them: without a C compiler, for another dtype or device, or with TINY_ONN_NATIVE=0, grouped.py computes
the same with PyTorch's own operations, several times slower where experts are small.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from tiny_onn_func.tiles import is_traced

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
TOO_LONG = 120  # seconds for a compiler
SIZE, POINTER, INT, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def can_take(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 on a CPU, and they could be compiled."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and library() is not None


def may_run(*tensors: Tensor) -> bool:
    """Whether the kernels take these here and now: nobody transforms, traces or differentiates what is done to them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not any(is_functorch_wrapped_tensor(t) or is_traced(t) for t in tensors) and can_take(*tensors)


def matmul(
    pairs: Sequence[tuple[Float[Tensor, "runs rows _"], Float[Tensor, "runs experts _ out_dim"]]],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs rows out_dim"]:
    """Each row times the weights of its expert, summed over one or two pairs of the same sizes; zeros behind the last
    offset. Transposed weights are taken as they lie."""
    transposed = all(weights.mT.is_contiguous() for _, weights in pairs)
    dense = [(rows.contiguous(), weights if transposed else weights.contiguous()) for rows, weights in pairs]
    (rows, weights), (others, other_weights) = dense[0], (*dense, (None, None))[1]
    runs, experts, in_dim, out_dim = weights.shape
    offsets, out = offsets.contiguous(), rows.new_empty(runs, rows.shape[1], out_dim)
    sizes = runs, rows.shape[1], experts, in_dim, out_dim
    pointers = (None if t is None else t.data_ptr() for t in (rows, weights, others, other_weights, offsets, out))
    if _kernels().grouped_matmul(*sizes, *pointers, transposed, torch.get_num_threads()):
        raise MemoryError("grouped_matmul: expected memory for one expert's weights, got none; use a smaller batch")
    return out


def outer(
    rows: Float[Tensor, "runs rows in_dim"],
    grads: Float[Tensor, "runs rows out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs experts in_dim out_dim"]:
    """The sum of rows[n]^T grads[n] over each expert's rows."""
    rows, grads, offsets = rows.contiguous(), grads.contiguous(), offsets.contiguous()
    runs, count, in_dim = rows.shape
    out = rows.new_empty(runs, offsets.shape[1], in_dim, grads.shape[2])
    sizes = runs, count, offsets.shape[1], in_dim, grads.shape[2]
    _kernels().grouped_outer(*sizes, *(t.data_ptr() for t in (rows, grads, offsets, out)), torch.get_num_threads())
    return out


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _kernels().swiglu(gate.numel(), gate.data_ptr(), up.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def swiglu_grad(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Gradients of silu(gate) * up in gate and up."""
    given = [t.contiguous() for t in (grad, gate, up)]
    made = torch.empty_like(given[1]), torch.empty_like(given[2])
    _kernels().swiglu_grad(gate.numel(), *(t.data_ptr() for t in (*given, *made)), torch.get_num_threads())
    return made


def scaled_rows(
    x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens slots"], order: Int[Tensor, " rows"]
) -> Float[Tensor, "rows dim"]:
    """rows[n] = x[order[n] // slots] * weights.flatten()[order[n]]."""
    given = [t.contiguous() for t in (x, weights, order)]
    (count,), (dim, slots) = order.shape, (x.shape[1], weights.shape[1])
    rows = x.new_empty(count, dim)
    pointers = (t.data_ptr() for t in (*given, rows))
    _kernels().scaled_rows(count, dim, slots, *pointers, torch.get_num_threads())
    return rows


def attention(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "#batch seq seq"],
) -> tuple[Float[Tensor, "batch groups share seq dim"], Float[Tensor, "batch groups share seq"]]:
    """Causal softmax(q k^T + bias) v, and the logarithm of each softmax's sum."""
    given = [t.contiguous() for t in (q, k, v, bias)]
    out, log_sums = torch.empty_like(given[0]), given[0].new_empty(q.shape[:-1])
    pointers = [t.data_ptr() for t in given]
    made = (out.data_ptr(), log_sums.data_ptr(), torch.get_num_threads())
    if _kernels().attention(*q.shape, *pointers, int(bias.shape[0] > 1), *made):
        raise MemoryError("attention: expected memory for one head's scores, got none; use a smaller sequence_length")
    return out, log_sums


def attention_grad(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "#batch seq seq"],
    out: Float[Tensor, "batch groups share seq dim"],
    log_sums: Float[Tensor, "batch groups share seq"],
    grad: Float[Tensor, "batch groups share seq dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` in q, k and v."""
    given = [t.contiguous() for t in (q, k, v, bias)]
    known = [t.contiguous() for t in (out, log_sums, grad)]
    made = torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(given[2])
    pointers, more = [t.data_ptr() for t in given], [t.data_ptr() for t in (*known, *made)]
    if _kernels().attention_grad(*q.shape, *pointers, int(bias.shape[0] > 1), *more, torch.get_num_threads()):
        raise MemoryError("attention: expected memory for one head's scores, got none; use a smaller sequence_length")
    return made


def adamw(
    numbers: Float[Tensor, "runs 6"],
    params: Float[Tensor, "runs *shape"],
    grads: Float[Tensor, "runs *shape"],
    mu: Float[Tensor, "runs *shape"],
    nu: Float[Tensor, "runs *shape"],
) -> tuple[Float[Tensor, "runs *shape"], Float[Tensor, "runs *shape"], Float[Tensor, "runs *shape"]]:
    """New parameters and moments, each read and written once.

    Args:
        numbers: of each run, what gradients are multiplied with, 1 - beta1, 1 - beta2, eps, decay and step.
    """
    given = [t.contiguous() for t in (params, grads, mu, nu)]
    made = [torch.empty_like(given[0]) for _ in range(3)]
    numbers, runs = numbers.contiguous(), params.shape[0]
    pointers = (t.data_ptr() for t in (*given, *made))
    tiny = torch.finfo(params.dtype).tiny
    _kernels().adamw(
        runs, params.numel() // runs, numbers.data_ptr(), tiny, *pointers, torch.get_num_threads()
    )  # fmt: skip
    return made[0], made[1], made[2]


@cache
def library() -> Path | None:
    """The compiled file; None where there can be none."""
    if os.environ.get("TINY_ONN_NATIVE") == "0":
        return None
    with suppress(OSError, subprocess.SubprocessError):
        home = Path(os.environ.get("TINY_ONN_NATIVE_CACHE") or "~/.cache/tiny-onn/native").expanduser()
        path = home / f"kernels-{_fingerprint()}.so"
        if not path.is_file():
            _compile(path)
        ctypes.CDLL(str(path))  # whether it loads
        return path
    return None


@cache
def _kernels() -> Any:
    return typed(ctypes.CDLL(str(library())))


def typed(kernels: Any) -> Any:
    """With the argument types of every kernel: sizes, pointers, numbers."""
    kernels.grouped_matmul.argtypes = [SIZE] * 5 + [POINTER] * 6 + [INT] * 2
    kernels.grouped_outer.argtypes = [SIZE] * 5 + [POINTER] * 4 + [INT]
    kernels.swiglu.argtypes = [SIZE] + [POINTER] * 3 + [INT]
    kernels.swiglu_grad.argtypes = [SIZE] + [POINTER] * 5 + [INT]
    kernels.scaled_rows.argtypes = [SIZE] * 3 + [POINTER] * 4 + [INT]
    kernels.attention.argtypes = [SIZE] * 5 + [POINTER] * 4 + [INT] + [POINTER] * 2 + [INT]
    kernels.attention_grad.argtypes = [SIZE] * 5 + [POINTER] * 4 + [INT] + [POINTER] * 6 + [INT]
    kernels.adamw.argtypes = [SIZE] * 2 + [POINTER, FLOAT] + [POINTER] * 7 + [INT]
    return kernels


def _fingerprint() -> str:
    """Of the source, and of the processor that it is compiled for: a home folder may serve several machines."""
    told = [platform.machine(), *FLAGS]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256(SOURCE.read_bytes() + "\n".join(told).encode()).hexdigest()[:16]


def _compile(path: Path) -> None:
    """Make the file, whole or not at all; two processes may do so at once.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it refuses.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("a C compiler called cc, gcc or clang")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        made = Path(draft, "kernels.so")
        for flags in (FLAGS, [flag for flag in FLAGS if flag != "-fopenmp"]):  # one thread, where there is no OpenMP
            command = [compiler, *flags, "-o", str(made), str(SOURCE), "-lm"]
            ended = subprocess.run(command, check=False, capture_output=True, timeout=TOO_LONG)
            if ended.returncode == 0:
                break
        ended.check_returncode()
        os.replace(made, path)
