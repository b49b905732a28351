"""A teacher for distillation: any causal language model that transformers opens, as a pure function of a batch."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from training.batch import Batch
from training.errors import UserError
from training.run_config import RunConfig

Teacher = Callable[[Batch], Tensor]  # (batch) -> (B, S, V) float32 logits


def open_teacher(config: RunConfig) -> Teacher | None:
    """The teacher that a run names; None without one. Its weights stay on the CPU, in float32.

    With `teacher_cache` the logits of a batch are kept on disk, batch * sequence * vocabulary * 4 bytes each, under
    the hash of the tokens and of the teacher's files, beside the token cache: a second run, or a resumed one, that sees
    the same batches asks the teacher nothing.

    Raises:
        UserError: no folder, no safetensors in it (no code of a checkpoint is ever run), another vocabulary.
    """
    if config.teacher is None:
        return None
    folder = Path(config.teacher)
    if not (folder / "config.json").is_file():
        raise UserError(f"teacher: expected a folder with a config.json of Hugging Face, got {folder}; name one")
    if not [*folder.glob("*.safetensors")]:
        raise UserError(f"teacher: expected .safetensors in {folder}, found none; save the model anew as safetensors")
    model: Any = _load(folder)
    if model.config.vocab_size != config.model.vocab_size:
        wanted = f"{model.config.vocab_size}, as the teacher's"
        raise UserError(f"model.vocab_size: expected {wanted}, got {config.model.vocab_size}; they must share tokens")

    def logits(batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        with torch.no_grad():
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return found.logits.to(torch.float32)

    return _kept(logits, folder) if config.teacher_cache else logits


def _load(folder: Path) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("teacher: expected the package transformers; pip install tiny-onn-func[hf]") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except Exception as error:  # whatever the library finds wrong with a folder
        raise UserError(f"teacher: expected a causal language model in {folder}, got: {_one_line(error)}") from None
    return model.requires_grad_(False)  # from_pretrained leaves it in evaluation mode


def _kept(logits: Teacher, folder: Path) -> Teacher:
    """The same function, which looks on the disk first."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    teacher = hashlib.sha256(json.dumps([str(folder.resolve()), files]).encode()).hexdigest()
    home = Path(os.environ.get("TINY_ONN_CACHE") or "~/.cache/tiny-onn").expanduser() / "teacher" / teacher[:32]
    home.mkdir(parents=True, exist_ok=True)

    def kept(batch: Batch) -> Tensor:
        seen = hashlib.sha256(teacher.encode())
        for part in (batch.input_ids, batch.attention_mask):
            seen.update(str(tuple(part.shape)).encode() + part.numpy().tobytes())
        path = home / f"{seen.hexdigest()[:32]}.safetensors"
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}.tmp")
            draft.write_bytes(save({"logits": logits(batch).contiguous()}))
            draft.replace(path)
        return load_file(path)["logits"]

    return kept


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
