"""A teacher for distillation: any causal language model that transformers opens, as a pure function of a batch."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tiny_onn_func.tree import unstack
from training.data.hf_tokenizer import check_same_tokens
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.step.batch import Batch
from training.storage.atomic import cache_folder

Teacher = Callable[[Batch], Tensor]  # (batch) -> (B, S, V) float32 logits


def open_teacher(config: RunConfig, tokenizer: Tokenizer) -> Teacher | None:
    """The teacher that a run names; None without one. Its weights stay on the CPU, in float32.

    With `teacher_cache` the logits of a batch are kept on disk, batch * sequence * vocabulary * 4 bytes each, under
    the hash of the tokens and of the teacher's weights, beside the token cache: a second run, or a resumed one, that
    sees the same batches asks the teacher nothing.

    Raises:
        UserError: no folder, no safetensors in it (no code of a checkpoint is ever run), weights that are not all
            there, another vocabulary, sequences longer than it can read, a disk without room for its logits.
    """
    if config.teacher is None:
        return None
    folder = Path(config.teacher)
    if not (folder / "config.json").is_file():
        raise UserError(f"teacher: expected a folder with a config.json of Hugging Face, got {folder}; name one")
    if not [*folder.glob("*.safetensors")]:
        raise UserError(f"teacher: expected .safetensors in {folder}, found none; save the model anew as safetensors")
    check_same_tokens(tokenizer, folder, "teacher")
    model = _load(folder)
    sizes = model.config.get_text_config()
    if sizes.vocab_size != config.model.vocab_size:
        wanted = f"{sizes.vocab_size}, as the teacher's"
        raise UserError(f"model.vocab_size: expected {wanted}, got {config.model.vocab_size}; they must share tokens")
    longest = getattr(sizes, "max_position_embeddings", None) or config.sequence_length
    if longest < config.sequence_length:
        wanted = f"at most {longest}, what the teacher can read"
        raise UserError(f"sequence_length: expected {wanted}, got {config.sequence_length}; shorten it")

    def logits(batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        with torch.no_grad():
            output = model(input_ids=batch.input_ids.cpu(), attention_mask=batch.attention_mask.cpu(), use_cache=False)
        return output.logits.to(batch.input_ids.device, torch.float32)

    return _kept(logits, folder, config) if config.teacher_cache else logits


def ask(teacher: Teacher | None, batches: Batch) -> tuple[Tensor, ...]:
    """The logits for stacked batches, (R, B, S, V), equal batches asked for once; nothing without a teacher."""
    if teacher is None:
        return ()
    known: dict[bytes, Tensor] = {}
    logits = []
    for batch in unstack(batches):
        key = batch.input_ids.cpu().numpy().tobytes() + batch.attention_mask.cpu().numpy().tobytes()
        if key not in known:
            known[key] = teacher(batch)
        logits.append(known[key])
    return (torch.stack(logits),)


def _load(folder: Path) -> Any:
    """The model, whole: transformers would draw at random what a folder lacks."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("teacher: expected the package transformers; pip install tiny-onn-func[hf]") from None
    library: Any = AutoModelForCausalLM
    try:
        with _quiet():  # eager attention: config.json could name another, which is code fetched from a hub
            model, loading_info = library.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
                attn_implementation="eager", output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever the library finds wrong with a folder
        raise UserError(f"teacher: expected a causal language model in {folder}, got: {_one_line(error)}") from None
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(f"teacher: expected all weights of the model in {folder}, got none for {missing[0]}")
    return model.requires_grad_(False)  # from_pretrained leaves it in evaluation mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and tables: what is wrong is said in a line."""
    from transformers.utils import logging

    theirs: Any = logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


# Kept logits ----------------------------------------------------------------------------------------------------------


def _kept(logits: Teacher, folder: Path, config: RunConfig) -> Teacher:
    """The same function, which looks on the disk first."""
    weights = hashlib.sha256()
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        with file.open("rb") as opened:
            weights.update(hashlib.file_digest(opened, "sha256").digest())
    teacher = weights.hexdigest()
    home = cache_folder() / "teacher" / teacher[:32]
    _check_room(home, config)
    home.mkdir(parents=True, exist_ok=True)

    def kept(batch: Batch) -> Tensor:
        digest = hashlib.sha256(teacher.encode())
        for part in (batch.input_ids, batch.attention_mask):
            digest.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
        path = home / f"{digest.hexdigest()[:32]}.safetensors"
        try:
            return load_file(path)["logits"].to(batch.input_ids.device)
        except (FileNotFoundError, SafetensorError, KeyError):  # not there yet, or broken off by a power cut
            answer = logits(batch).contiguous()
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            draft.write_bytes(save({"logits": answer.cpu()}))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return answer

    return kept


def _check_room(home: Path, config: RunConfig) -> None:
    """Refuse to begin what the disk cannot hold; what is there already may be what is needed."""
    needed = 4 * config.steps * config.batch_size * config.sequence_length * config.model.vocab_size
    there = sum(file.stat().st_size for file in home.iterdir()) if home.is_dir() else 0
    place = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed - there > free:
        wanted = f"room for {needed - there:,} bytes in {home} (steps * batch * sequence * vocabulary * 4)"
        raise UserError(f"teacher_cache: expected {wanted}, got {free:,}; make room, or leave it away")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
