"""Choose the device and the precision of a run, and say why."""

import os
from dataclasses import replace
from typing import NamedTuple

import torch

from training.errors import UserError
from training.run.config import DEVICE, Precision, RunConfig


class Placement(NamedTuple):
    """Where a run is computed, in what, and the reason of each choice."""

    device: torch.device
    precision: Precision
    device_reason: str
    precision_reason: str


def place(config: RunConfig, local_rank: int = 0) -> tuple[RunConfig, Placement]:
    """The settings with their precision spelled out, so that a resumed run keeps it, and the device.

    Args:
        local_rank: of the processes of one machine each takes its own CUDA device.

    Raises:
        UserError: a device that is not there, or a precision that it lacks.
    """
    device, device_reason = choose_device(config.device, local_rank)
    precision, precision_reason = choose_precision(config.precision, device)
    if device.type == "cuda":
        _same_bits_again(device)
    return replace(config, precision=precision), Placement(device, precision, device_reason, precision_reason)


def _same_bits_again(device: torch.device) -> None:
    """Make a CUDA device compute the same bits every time, so that a resumed run equals one that never stopped."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)


def choose_device(name: str, local_rank: int = 0, key: str = "device") -> tuple[torch.device, str]:
    """The device that a setting names, and why it is this one.

    Raises:
        UserError: it is not there; the message names `key`.
    """
    if not DEVICE.fits(name):
        raise UserError(f"{key}: expected {DEVICE.wanted}, got {name!r}; name one of them")
    kind, _, index = name.partition(":")
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type not in ("cuda", "mps"):
            return torch.device("cpu"), "no accelerator that torch can use"
        kind, reason = accelerator.type, "the accelerator of this machine"
    else:
        reason = "as set"
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            _refuse(key, name, "auto or cpu, as torch " + torch.__version__ + " sees no CUDA device")
        place = int(index) if index else local_rank % count
        if place >= count:
            _refuse(key, name, f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0, the only one")
        return torch.device("cuda", place), reason
    if kind == "mps" and not torch.backends.mps.is_available():
        _refuse(key, name, "auto or cpu, as torch " + torch.__version__ + " sees no MPS device")
    return torch.device(kind), reason


def choose_precision(name: Precision, device: torch.device) -> tuple[Precision, str]:
    """float32 or bfloat16 for a setting of auto, float32 or bfloat16, and why.

    Raises:
        UserError: the device lacks it.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(f"precision: expected float32 on {device}, which has no bfloat16, got bfloat16; leave it away")
    if name != "auto":
        return name, "as set"
    if device.type == "cuda" and has_bfloat16:
        return "bfloat16", "the device has it; router, surprise, parameters and moments stay float32"
    return "float32", "bfloat16 is not faster here" if has_bfloat16 else "the device has no bfloat16"


def _refuse(key: str, name: str, wanted: str) -> None:
    raise UserError(f"{key}: expected {wanted}, got {name}; `tiny-onn doctor` shows what is there")
