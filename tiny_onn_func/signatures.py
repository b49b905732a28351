"""The compiled library with the argument types of its kernels: sizes, pointers, numbers."""

import ctypes
from functools import cache
from typing import Any

from tiny_onn_func.native import library

SIZE, POINTER, INT, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@cache
def loaded() -> Any:
    """The library of this processor, which `native.library` has made."""
    return typed(ctypes.CDLL(str(library())))


def typed(kernels: Any) -> Any:
    """With the argument types of every kernel."""
    kernels.grouped_matmul.argtypes = [SIZE] * 6 + [POINTER] * 5 + [SIZE] + [POINTER] * 2 + [INT] * 2
    kernels.grouped_outer.argtypes = [SIZE] * 6 + [POINTER] * 5 + [INT]
    kernels.swiglu.argtypes = [SIZE] + [POINTER] * 3 + [INT]
    kernels.swiglu_grad.argtypes = [SIZE] + [POINTER] * 5 + [INT]
    kernels.scaled_rows.argtypes = [SIZE] * 3 + [POINTER] * 4 + [INT]
    kernels.combined_rows.argtypes = [SIZE] * 3 + [POINTER] * 4 + [INT]
    kernels.sort_rows.argtypes = [SIZE] * 3 + [POINTER] * 6 + [INT]
    kernels.rms_norm.argtypes = [SIZE] * 3 + [FLOAT] + [POINTER] * 3 + [INT]
    kernels.rms_norm_grad.argtypes = [SIZE] * 4 + [FLOAT] + [POINTER] * 5 + [INT]
    kernels.split_heads.argtypes = [SIZE] * 6 + [FLOAT] + [POINTER] * 7 + [INT]
    kernels.split_heads_grad.argtypes = [SIZE] * 6 + [FLOAT] + [POINTER] * 10 + [INT]
    kernels.cross_entropy.argtypes = [SIZE] * 2 + [POINTER] * 6 + [INT]
    kernels.cross_entropy_grad.argtypes = [SIZE] * 2 + [POINTER] * 5 + [INT]
    kernels.attention.argtypes = [SIZE] * 5 + [POINTER] * 4 + [SIZE] + [POINTER] * 2 + [INT]
    kernels.attention_grad.argtypes = [SIZE] * 5 + [POINTER] * 4 + [SIZE] + [POINTER] * 6 + [INT]
    kernels.adamw.argtypes = [SIZE] * 2 + [POINTER] * 2 + [FLOAT] + [POINTER] * 7 + [INT]
    kernels.choose.argtypes = [SIZE] * 5 + [INT] + [POINTER] * 7 + [INT]
    kernels.spread_surprise.argtypes = [SIZE] * 6 + [INT] + [POINTER] * 5 + [INT]
    kernels.least_surprised.argtypes = [SIZE] * 4 + [POINTER] * 7 + [INT]
    kernels.router_sums.argtypes = [SIZE] * 4 + [POINTER] * 7 + [INT]
    kernels.router_sums_grad.argtypes = [SIZE] * 4 + [POINTER] * 8 + [INT]
    kernels.routing_sums.argtypes = [SIZE] * 5 + [POINTER] * 14 + [INT]
    return kernels
