"""The mathematics of Tiny-ONN: pure functions over nested dicts of tensors."""

from importlib import import_module  # noqa: TID251 - of the homes below alone
from typing import TYPE_CHECKING, Any

import tiny_onn_func.kernels.waiting  # noqa: F401  before anything imports torch

if TYPE_CHECKING:
    from tiny_onn_func.config import ModelConfig
    from tiny_onn_func.decoder import forward
    from tiny_onn_func.huggingface.pretrained import load_pretrained, save_pretrained
    from tiny_onn_func.inference.generate import generate
    from tiny_onn_func.params import init_params

__all__ = ["ModelConfig", "forward", "generate", "init_params", "load_pretrained", "save_pretrained"]

_HOMES = {
    "ModelConfig": "config",
    "forward": "decoder",
    "generate": "inference.generate",
    "init_params": "params",
    "load_pretrained": "huggingface.pretrained",
    "save_pretrained": "huggingface.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import a name, and with it torch, when it is first asked for: the command line starts, and stops, without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
