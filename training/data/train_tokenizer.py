"""Byte pairs (BPE) learned from a text: a tokenizer.json that gives every text back, and its tokenizer_config.json."""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from training.data.hf_tokenizer import library, open_tokenizer
from training.data.mixture import parse_mixture
from training.data.readers import Document, Segment, printable
from training.data.sources import Source, documents, find_source
from training.data.streams import has_both_sides, is_held_out, resolve_split, seamless
from training.data.tokenizer import BOUNDARY_TEXT, FILE, SETTINGS, TURN_END, TURN_START, utf8
from training.errors import UserError

MARKS = (BOUNDARY_TEXT, TURN_START, TURN_END)
LEAST = 256 + len(MARKS)
MOST = (1 << 24) - 1
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(data: str, out: str | Path, vocab_size: int, *, holdout: float = 0.1, split: str = "auto") -> Path:
    """Learn byte pairs from the part of a source that a run would train on; returns their folder's absolute path.

    The same source and numbers give the same files. Words are parted as GPT-2 parts them; ids 0 to 2 are
    `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, then come the 256 bytes, then the pairs, most frequent first.

    Args:
        data: what `--data` takes; of a mixture all sources in full, whatever their weights.
        out: a new or empty folder; it appears whole or not at all.
        vocab_size: tokens in all, from 259 to 16777215. A short text may not have so many pairs.
        holdout, split: as in a run; what is held out there is not looked at here.

    Raises:
        UserError: a number out of range, a source that cannot be read, a text with too few pairs, no `tokenizers`,
            `out` holds something.
    """
    if not LEAST <= vocab_size <= MOST:
        wanted = f"{LEAST} (256 bytes and {len(MARKS)} marks) to {MOST}"
        raise UserError(f"--vocab-size: expected {wanted}, got {vocab_size}; 4096 is usual for a small model")
    if not 0 < holdout < 1:
        raise UserError(f"--holdout: expected more than 0 and less than 1, got {holdout!r}")
    target = Path(out).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out: expected a new or empty folder, got {printable(target)}; name another")
    hf = library("tokenizer train")
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*MARKS], initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = chain.from_iterable(_texts(source, holdout, split) for source, _ in parse_mixture(data))
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() < vocab_size:
        came = inner.get_vocab_size()
        raise UserError(f"--vocab-size: expected at most {came}, all that {data} has pairs for, got {vocab_size}")
    special = {mark: inner.token_to_id(mark) for mark in MARKS}
    settings = tokenizer_settings(special, special[BOUNDARY_TEXT])
    files = {FILE: inner.to_str(pretty=True), SETTINGS: json.dumps(settings, indent=2) + "\n"}
    return _write(target, files)


def tokenizer_settings(
    special: Mapping[str, int], boundary: int, model_max_length: int | None = None
) -> dict[str, Any]:
    """tokenizer_config.json for `AutoTokenizer`; with the template of a chat where there are marks for its turns."""
    end = next(text for text, token in special.items() if token == boundary)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    if {TURN_START, TURN_END} <= special.keys():
        settings["chat_template"] = CHAT
    return settings


def _texts(data: str, holdout: float, asked: str) -> Iterator[str]:
    """Yield the text that a run would train on, in pieces; of chats the contents, without the marks around them."""
    source = find_source(data)
    split, rows = resolve_split(asked, documents(source))
    if asked == "auto" and split == "document" and not has_both_sides(documents(source), holdout):
        split = "tail"
    if split == "tail":
        rows = _beginning(source, holdout)
    for document in rows:
        if split == "tail" or not is_held_out(document, holdout):
            for part in document:
                yield from (piece.encode("utf-8", "replace").decode() for piece in seamless(part.text))


def _beginning(source: Source, holdout: float) -> Iterator[Document]:
    """The segments of a source in front of its tail, the last one cut: by the bytes and marks of a run's stream."""
    boundary = 1
    size = sum(boundary + sum(_mark_size(part) + len(utf8(part.text)) for part in doc) for doc in documents(source))
    left = int((size - 1) * (1 - holdout))
    for document in documents(source):
        for part in document:
            left -= _mark_size(part)
            text = utf8(part.text)
            if left < len(text):
                yield (part._replace(text=text[: max(left, 0)].decode("utf-8", "ignore")),)
                return
            yield (part,)
            left -= len(text)
        left -= boundary


def _mark_size(part: Segment) -> int:
    """Size of a turn's marks in the stream: two marks, its role, two line ends. All count as in front of its text."""
    return 0 if part.role is None else 4 + len(utf8(part.role))


def _write(target: Path, files: Mapping[str, str]) -> Path:
    """The folder with its files, whole or not there at all."""
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_text(content, encoding="utf-8")
        open_tokenizer(draft)  # what cannot be read back is not handed out
        draft.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
