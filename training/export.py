"""A run -> a folder that Hugging Face's tools open: weights, configuration, tokenizer, generation settings."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.hf_folder import check_target
from tiny_onn_func.interop import inexpressible, save_model
from training.errors import UserError
from training.runs import open_run
from training.tokens import BOUNDARY, BOUNDARY_TEXT

SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": BOUNDARY, "pad_token_id": BOUNDARY}


def export_run(run: str | Path, out: str | Path, *, num_experts_per_tok: int | None = None) -> Path:
    """Write the newest checkpoint of a run as a Qwen3-MoE folder; the absolute path of it.

    Args:
        out: a new or empty folder, or an earlier export.
        num_experts_per_tok: experts of a token (K) from now on; by default the run's own, where that is a number.

    Raises:
        UserError: no run, a model that Qwen3-MoE cannot express, a K out of range.
        ValueError: `out` holds something else, or the disk refuses.
    """
    check_target(out)
    config, params = open_run(run)
    model = config.model
    if num_experts_per_tok is not None:
        if not 1 <= num_experts_per_tok <= model.num_experts:
            wanted = f"1 to {model.num_experts} (the run's experts)"
            raise UserError(f"--num-experts-per-tok: expected {wanted}, got {num_experts_per_tok}")
        model = replace(model, num_experts_per_tok=num_experts_per_tok)
    reason = inexpressible(params, model)
    if reason is not None:
        raise UserError(f"{run}: Qwen3-MoE has no name for {reason}; {_advice(run, model.num_experts_per_tok)}")
    extra = {"max_position_embeddings": config.sequence_length, **SPECIAL_IDS}
    return save_model(params, model, out, extra=extra, files=byte_tokenizer_files(config.sequence_length))


def byte_tokenizer_files(model_max_length: int) -> dict[str, bytes]:
    """The tokenizer of `training.tokens` for `AutoTokenizer`, and what `generate` should stop at.

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
    generation = {"do_sample": False, **{key: value for key, value in SPECIAL_IDS.items() if value is not None}}
    return {
        "tokenizer.json": _byte_tokenizer().encode(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json(generation),
    }


def _byte_tokenizer() -> str:
    """tokenizer.json: the byte-level alphabet, every character with the id of the byte that it stands for."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise UserError("export: expected the package tokenizers; pip install 'tiny-onn-func[hf]'") from None
    # the alphabet shows a byte as its Latin-1 character where that is visible; the others follow from U+0100 on
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {ord(character) for character in alphabet if ord(character) < 256}
    rest = iter(character for character in alphabet if ord(character) >= 256)
    vocabulary = {chr(byte) if byte in visible else next(rest): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOUNDARY_TEXT, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


def _advice(run: str | Path, num_experts_per_tok: int) -> str:
    if num_experts_per_tok != DYNAMIC_K:
        return "train with hyper.bias_speed 0, or keep it for ourselves with tiny_onn_func.save_pretrained"
    return f"choose with --num-experts-per-tok K how many experts a token visits{_average(run)}"


def _average(run: str | Path) -> str:
    """What the run's own summary says of its average K, if it does."""
    try:
        average = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))["avg_k"]
        return f" (this run visited {float(average):.1f} on average)"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
