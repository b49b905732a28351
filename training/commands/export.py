"""A run -> a folder that Hugging Face's tools open: weights, configuration, tokenizer, generation settings, card."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.huggingface.pretrained import inexpressible, save_model
from training.commands.model_card import model_card
from training.commands.push import open_hub, push_folder
from training.commands.target import check_out
from training.data.hf_tokenizer import byte_alphabet, library
from training.data.tokenizer import BOUNDARY, BOUNDARY_TEXT, BYTES, FILE, SETTINGS, TURN_END, Tokenizer
from training.data.train_tokenizer import tokenizer_settings
from training.errors import UserError
from training.run.finished import open_run
from training.storage.regular_file import read_object
from training.terminal import LOG

CARD = "README.md"


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    num_experts_per_tok: int | None = None,
    force: bool = False,
    push: str | None = None,
) -> Path:
    """Write the newest checkpoint of a run as a Qwen3-MoE folder with a model card; returns its absolute path.

    Args:
        out: a new or empty folder.
        num_experts_per_tok: experts of a token (K) from now on; by default the run's own, where that is a number.
        force: replace an earlier export in `out`.
        push: OWNER/NAME of a model of the Hugging Face Hub to which the folder is uploaded, too.

    Raises:
        UserError: no run, a model that Qwen3-MoE cannot express, a K out of range, an earlier export in `out`; the Hub
            refuses, after the folder was written.
        ValueError: `out` holds something else, or the disk refuses.
    """
    check_out(out, force=force)
    hub = None if push is None else open_hub(push)
    config, params, tokenizer = open_run(run)
    model = config.model
    if num_experts_per_tok is not None:
        if not 1 <= num_experts_per_tok <= model.num_experts:
            wanted = f"1 to {model.num_experts} (the run's experts)"
            raise UserError(f"--num-experts-per-tok: expected {wanted}, got {num_experts_per_tok}")
        # floor and cap bounded the budget's choice, which this K replaces
        model = replace(model, num_experts_per_tok=num_experts_per_tok, min_experts_per_tok=1, max_experts_per_tok=None)
    reason = inexpressible(params, model)
    if reason is not None:
        raise UserError(f"{run}: Qwen3-MoE has no name for {reason}; {_advice(run, model.num_experts_per_tok)}")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.boundary, "pad_token_id": tokenizer.boundary}
    extra = {"max_position_embeddings": config.sequence_length, **ids}
    files = {**tokenizer_files(tokenizer, config.sequence_length), CARD: model_card(run, config, model).encode()}
    folder = save_model(params, model, out, extra=extra, files=files)
    if hub is not None and push is not None:
        LOG.info("pushed: %s", push_folder(hub, folder, push))
    return folder


def tokenizer_files(tokenizer: Tokenizer, model_max_length: int) -> dict[str, bytes]:
    """A run's tokenizer for `AutoTokenizer`, and what `generate` should stop at: the end of a document, or of a turn.

    Its tokenizer.json bit for bit; tokenizer_config.json, where it came without one, as short as it can be.
    """
    if tokenizer is BYTES:
        return byte_tokenizer_files(model_max_length)
    settings = {SETTINGS: _json(tokenizer_settings(tokenizer.special, tokenizer.boundary, model_max_length))}
    turn = tokenizer.special.get(TURN_END)
    return {**settings, **tokenizer.files, **_generation(tokenizer.boundary, turn)}


def _generation(boundary: int, turn: int | None = None) -> dict[str, bytes]:
    ends = boundary if turn is None else [boundary, turn]
    return {"generation_config.json": _json({"do_sample": False, "eos_token_id": ends, "pad_token_id": boundary})}


def byte_tokenizer_files(model_max_length: int) -> dict[str, bytes]:
    """The bytes of `training.data.tokenizer` for `AutoTokenizer`, and what `generate` should stop at.

    Ids 0 to 255 are the bytes of UTF-8, 256 is the document boundary; no merges, no normalisation. A text that spells
    the boundary is its bytes, as it is here: only the id 256 is the boundary.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "eos_token": BOUNDARY_TEXT,
        "pad_token": BOUNDARY_TEXT,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    return {FILE: _byte_tokenizer().encode(), SETTINGS: _json(settings), **_generation(BOUNDARY)}


def _byte_tokenizer() -> str:
    """tokenizer.json: the byte-level alphabet, every character with the id of the byte that it stands for."""
    hf = library("export")
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([hf.AddedToken(BOUNDARY_TEXT, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


def _advice(run: str | Path, num_experts_per_tok: int) -> str:
    if num_experts_per_tok != DYNAMIC_K:
        return (
            "train with the settings of --config small_qwen3 and no bias_speed, or keep it as our own: save_pretrained"
        )
    return f"choose with --num-experts-per-tok K how many experts a token visits{_average(run)}"


def _average(run: str | Path) -> str:
    """Average K of the run's summary.json as a phrase, or "" if there is none."""
    try:
        average = read_object(Path(run, "summary.json"))["avg_k"]
        return f" (this run visited {float(average):.1f} on average)"
    except (ValueError, KeyError, TypeError):
        return ""


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
