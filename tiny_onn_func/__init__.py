"""The mathematics of Tiny-ONN: pure functions over nested dicts of tensors."""

import tiny_onn_func.kernels.waiting  # noqa: F401  before anything imports torch
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.huggingface.pretrained import load_pretrained, save_pretrained
from tiny_onn_func.inference.generate import generate
from tiny_onn_func.params import init_params

__all__ = ["ModelConfig", "forward", "generate", "init_params", "load_pretrained", "save_pretrained"]
