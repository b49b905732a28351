"""Open a Hugging Face tokenizer.json, and check that two tokenizers agree."""

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from training.data.readers import printable
from training.data.tokenizer import BOUNDARY_TEXT, BYTES, FILE, HALF_PAIRS, SETTINGS, Tokenizer, Tokens, as_tokens
from training.errors import UserError
from training.storage.regular_file import read_small

MOST_TOKENS, MOST_BYTES = 1 << 24, 1 << 27  # ids, and bytes of a file
LONE_BYTES = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as `surrogateescape` spells them
PROBE = (  # a tokenizer that changes case, spaces, digits, ligatures or rare bytes does not give this back
    " a  b\n\n\tIF if 1234  don't\r\n \u00e9 e\u0301 \ufb01 \u212b \u6f22\u5b57 \u0e01 \U0001f600 \x00\x7f\u2581x "
)


# Hugging Face ---------------------------------------------------------------------------------------------------------


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """`bytes`, a tokenizer.json, or a folder that holds one.

    Raises:
        UserError: no such file, no tokenizer, one that does not give back the text it took, or one without a special
            token that can close a document: `<|endoftext|>`, else the eos_token of tokenizer_config.json.
    """
    if spec == "bytes":
        return BYTES
    location = Path(os.path.expanduser(spec))
    path = location / FILE if location.is_dir() else location
    if not path.is_file():
        came = f"a folder without {FILE}" if location.is_dir() else "no such file"
        raise UserError(f"tokenizer: {printable(location)}: expected bytes, a {FILE} or a folder with one, got {came}")
    try:
        data = read_small(path, MOST_BYTES)
        beside = path.with_name(SETTINGS)
        settings = read_small(beside, MOST_BYTES) if location.is_dir() and beside.is_file() else None
    except OSError as error:
        _refuse(path, "a file that can be read", error.strerror or str(error))
    parsed = None if settings is None else _settings(beside, settings)
    return _parse(str(spec), path, data, parsed)


def run_tokenizer(folder: str | Path, spec: str, fingerprint: str) -> Tokenizer:
    """The copy of a tokenizer in the folder of a run.

    Args:
        spec: the run's setting: `bytes`, or where it came from.
        fingerprint: of the tokenizer that the run's parameters go with.

    Raises:
        UserError: there is none, or another one.
    """
    tokenizer = BYTES if spec == "bytes" else open_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        place = "tokenizer" if tokenizer is BYTES else printable(Path(folder, FILE))
        raise UserError(f"{place}: expected the tokenizer that the run was trained with, got another; restore it")
    return tokenizer


def vocab_follows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; where they name a tokenizer and no model.vocab_size, that of the tokenizer joins them."""
    if "tokenizer" not in settings or "model.vocab_size" in settings or not settings["tokenizer"]:
        return {**settings}
    return {**settings, "model.vocab_size": open_tokenizer(settings["tokenizer"]).vocab_size}


def check_same_tokens(tokenizer: Tokenizer, folder: str | Path, key: str) -> None:
    """Refuse the folder of a model, named by a setting, whose tokenizer.json spells the ids otherwise.

    Ids that only one of them has are fine: tokens added to a model later. Without the file the folder says nothing.
    """
    if not Path(folder, FILE).is_file():
        return
    theirs = open_tokenizer(folder).pieces
    shared = min(len(theirs), tokenizer.vocab_size)
    if theirs[:shared] != tokenizer.pieces[:shared]:
        wanted, came = f"the one of {key}, in {printable(Path(folder))}", printable(tokenizer.name)
        raise UserError(f"tokenizer: expected {wanted}, got {came}; write --tokenizer {printable(Path(folder))}")


def library(who: str) -> Any:
    """Import the package `tokenizers`; its absence is an error that names the feature `who`."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{who}: expected the package tokenizers; pip install tiny-onn-func[hf]") from None
    return tokenizers


def byte_alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for in a byte-level vocabulary.

    A byte is its Latin-1 character where that is visible; the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _refuse(path: Path, wanted: str, came: object) -> NoReturn:
    raise UserError(f"tokenizer: {printable(path)}: expected {wanted}, got: {' '.join(str(came).split())[:200]}")


def _settings(path: Path, data: bytes) -> dict[str, Any]:
    """tokenizer_config.json, without the key that names code."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        _refuse(path, "a JSON object", error)
    if not isinstance(values, dict):
        _refuse(path, "a JSON object", type(values).__name__)
    return {key: value for key, value in values.items() if key != "auto_map"}


def _parse(name: str, path: Path, data: bytes, settings: dict[str, Any] | None) -> Tokenizer:
    inner = _load(path, data)
    alphabet = byte_alphabet()
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    added = inner.get_added_tokens_decoder()
    if missing := sum(character not in vocabulary for character in alphabet):
        _refuse(path, "a byte-level tokenizer, as Qwen3's or GPT-2's", f"a vocabulary without {missing} of 256 bytes")
    if max(vocabulary.values()) >= MOST_TOKENS:
        _refuse(path, f"token ids below {MOST_TOKENS:,}", f"{max(vocabulary.values()):,}")
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for text, token in vocabulary.items():
        known = token not in added and all(character in alphabet for character in text)
        pieces[token] = bytes(alphabet[character] for character in text) if known else text.encode("utf-8", "replace")
    special = {entry.content: token for token, entry in added.items() if entry.special}
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    lengths[[*special.values()]] = 0
    byte_ids = {byte: vocabulary[character] for character, byte in alphabet.items()}

    def encode(text: str) -> Tokens:
        ids: list[int] = []
        for i, part in enumerate(LONE_BYTES.split(HALF_PAIRS.sub("\ufffd", text))):
            lone = i % 2 == 1  # the library takes no lone surrogates
            ids += [byte_ids[ord(c) - 0xDC00] for c in part] if lone else inner.encode(part, None, False, False).ids
        return as_tokens(ids, len(pieces))

    _probe(path, encode, pieces, lengths, [entry.content for entry in added.values()])
    boundary = _boundary(path, special, settings)
    files = {FILE: data} | ({} if settings is None else {SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()})
    fingerprint = hashlib.sha256(data + f"\0{boundary}".encode()).hexdigest()
    return Tokenizer(name, fingerprint, boundary, special, tuple(pieces), lengths, encode, files)


def _load(path: Path, data: bytes) -> Any:
    """The library's tokenizer, with nothing that adds or drops tokens."""
    hf = library("tokenizer")
    try:
        with _mute():
            inner = hf.Tokenizer.from_buffer(data)
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # a text that spells a special token is only text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        _refuse(path, "a tokenizer.json", error)
    return inner


@contextmanager
def _mute() -> Iterator[None]:
    """Nothing on the error stream: a library that panics writes pages there before Python hears of it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _probe(path: Path, encode: Callable[[str], Tokens], pieces: list[bytes], lengths: Any, added: list[str]) -> None:
    """Refuse a tokenizer whose tokens are not the bytes of the text, up to its Unicode normal form (NFC)."""
    for text in (PROBE, "".join(f" x {content} \n" for content in added)):
        try:
            with _mute():
                ids = encode(text).tolist()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
            _refuse(path, "a tokenizer that takes any text", error)
        spelled = b"".join(pieces[token] for token in ids)
        same = spelled in (text.encode(), unicodedata.normalize("NFC", text).encode())
        if not same or (lengths[ids] == 0).any():
            came = f"{spelled[:40]!r} back for {text[:40]!r}"
            _refuse(path, "a byte-level tokenizer that gives back its text, as Qwen3's or GPT-2's", came)


def _boundary(path: Path, special: Mapping[str, int], settings: Mapping[str, Any] | None) -> int:
    end = (settings or {}).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    for text in (BOUNDARY_TEXT, end):
        if isinstance(text, str) and text in special:
            return special[text]
    wanted = f"the special token {BOUNDARY_TEXT}, or an eos_token in {SETTINGS} beside it"
    _refuse(path, wanted, "neither, so nothing can close a document")
