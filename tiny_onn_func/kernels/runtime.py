"""The loaded library with its argument types, and the conditions under which its kernels may be called."""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from tiny_onn_func.kernels.build import library


def is_traced(t: Tensor) -> bool:
    """True while the program is traced: there are shapes, but no values."""
    return isinstance(t, FakeTensor)


Read = tuple[Tensor, tuple[int, ...], torch.dtype]  # a tensor, and the shape and dtype that C reads it with


def check(kernel: str, **tensors: Read) -> None:
    """Refuse what C would read as something else: the last wall before memory is reached by its address.

    Raises:
        ValueError: a tensor has another shape, dtype or device.
    """
    for name, (t, shape, dtype) in tensors.items():
        if t.shape != shape or t.dtype is not dtype or not t.is_cpu:
            wanted, got = f"{dtype} {tuple(shape)} on cpu", f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"{kernel}: expected {name} of {wanted}, got {got}")


def check_leaves(kernel: str, tree: str, leaves: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`check` of a tree's leaves, which are float32; at least those of `shapes`.

    Raises:
        ValueError: a leaf is missing, or has another shape, dtype or device.
    """
    for name, shape in shapes.items():
        t = leaves.get(name)
        if t is None:
            raise ValueError(f"{kernel}: expected {tree} to have a leaf {name}, got none")
        if t.shape != shape or t.dtype is not torch.float32 or not t.is_cpu:
            check(kernel, **{f"{name} of {tree}": (t, shape, torch.float32)})


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Where tensors lie, as an array of C; null for none."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


NO_MEMORY, OUTSIDE = 1, 2  # what a kernel returns; vectors.h


def refuse(kernel: str, code: int, indices: str = "", memory: str = "") -> NoReturn:
    """Say what a kernel did not find, `indices` in their range or `memory`.

    Raises:
        IndexError: a number is no index of what it should point into.
        MemoryError: there is none.
    """
    if code == OUTSIDE:
        raise IndexError(f"{kernel}: expected {indices}, got some outside")
    raise MemoryError(f"{kernel}: expected memory for {memory}")


SIZE, POINTER, INT, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@cache
def loaded() -> Any:
    """The library of this processor, which `native.library` has made."""
    return typed(ctypes.CDLL(str(library())))  # noqa: TID251 - find_library has made sure of its owner


def typed(kernels: Any) -> Any:
    """With the argument types of every kernel."""
    kernels.has_own_threads.argtypes = []
    kernels.grouped_matmul.argtypes = [SIZE] * 6 + [POINTER] * 5 + [SIZE] + [POINTER] * 2 + [INT] * 2
    kernels.grouped_outer.argtypes = [SIZE] * 6 + [POINTER] * 5 + [INT]
    kernels.swiglu.argtypes = [SIZE] + [POINTER] * 3 + [INT]
    kernels.swiglu_grad.argtypes = [SIZE] + [POINTER] * 5 + [INT]
    kernels.scaled_rows.argtypes = [SIZE] * 4 + [POINTER] * 4 + [INT]
    kernels.combined_rows.argtypes = [SIZE] * 4 + [POINTER] * 4 + [INT]
    kernels.sort_rows.argtypes = [SIZE] * 3 + [POINTER] * 6 + [INT]
    kernels.rms_norm.argtypes = [SIZE] * 3 + [FLOAT] + [POINTER] * 3 + [INT]
    kernels.rms_norm_grad.argtypes = [SIZE] * 4 + [FLOAT] + [POINTER] * 5 + [INT]
    kernels.split_heads.argtypes = [SIZE] * 6 + [FLOAT] + [POINTER] * 7 + [INT]
    kernels.split_heads_grad.argtypes = [SIZE] * 6 + [FLOAT] + [POINTER] * 10 + [INT]
    kernels.cross_entropy.argtypes = [SIZE] * 3 + [POINTER] * 6 + [INT]
    kernels.cross_entropy_grad.argtypes = [SIZE] * 3 + [POINTER] * 6 + [INT]
    kernels.attention.argtypes = [SIZE] * 5 + [POINTER] * 4 + [SIZE] + [POINTER] * 2 + [INT]
    kernels.attention_grad.argtypes = [SIZE] * 5 + [POINTER] * 4 + [SIZE] + [POINTER] * 6 + [INT]
    kernels.adamw.argtypes = [SIZE] * 2 + [POINTER] * 2 + [FLOAT] + [POINTER] * 7 + [INT]
    kernels.choose.argtypes = [SIZE] * 5 + [INT] + [POINTER] * 7 + [INT]
    kernels.spread_surprise.argtypes = [SIZE] * 6 + [INT] + [POINTER] * 5 + [INT]
    kernels.least_surprised.argtypes = [SIZE] * 4 + [FLOAT] + [POINTER] * 7 + [INT]
    kernels.router_sums.argtypes = [SIZE] * 4 + [POINTER] * 7 + [INT]
    kernels.router_sums_grad.argtypes = [SIZE] * 4 + [POINTER] * 8 + [INT]
    kernels.routing_sums.argtypes = [SIZE] * 5 + [POINTER] * 14 + [INT]
    kernels.decoder_room.argtypes, kernels.decoder_room.restype = [POINTER], SIZE
    kernels.decoder_pass.argtypes = [POINTER] * 6
    kernels.finish_step.argtypes = [POINTER] * 4
    return kernels


class _Threads:
    """Number of threads of the kernels in this process; None: as many as PyTorch has."""

    number: int | None = None


def threads() -> int:
    """Threads of a kernel: as many as PyTorch's operations have, unless `divide_threads` was called."""
    return torch.get_num_threads() if _Threads.number is None else _Threads.number


def divide_threads(number: int) -> None:
    """Give the kernels that many threads of their own and PyTorch's operations one: for processes of small steps.

    Where kernels do the work, PyTorch's threads have little to do and are asleep whenever they are asked.
    """
    torch.set_num_threads(1)
    _Threads.number = None if number == 1 else number


def supports(*tensors: Tensor) -> bool:
    """True if the kernels support these tensors, float32 on a CPU, and could be compiled."""
    for t in tensors:  # no generator: it takes twice as long, and every op asks several times
        if t.dtype is not torch.float32 or not t.is_cpu:
            return False
    return library() is not None


def usable_now(*tensors: Tensor) -> bool:
    """True if the kernels support these tensors and no transform, trace or autograd graph is recording."""
    return supports(*tensors) and is_untracked(*tensors)


def is_untracked(*tensors: Tensor) -> bool:
    """True if no transform, trace or autograd graph records what is computed from these tensors."""
    records = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110 (as in `supports`)
        if (records and t.requires_grad) or is_functorch_wrapped_tensor(t) or is_traced(t):
            return False
    return True
