"""Text <-> tokens: the bytes themselves, or a byte-level tokenizer.json; a table says which bytes a token stands for.

Any tokenizer here gives back the text it took, so bits per byte mean the same for all: nats over the BYTES of a text.
A folder is not trusted: of it tokenizer.json and tokenizer_config.json are read, as data; no code in it is run.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from training.errors import UserError
from training.sources import printable
from training.storage.atomic import write_bytes
from training.storage.regular_file import read_small

BOUNDARY = 256
BOUNDARY_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 257
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MOST_TOKENS, MOST_BYTES = 1 << 24, 1 << 27  # ids, and bytes of a file
HALF_PAIRS = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that do not stand for a byte
LONE_BYTES = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as `surrogateescape` spells them
PROBE = (  # a tokenizer that changes case, spaces, digits, ligatures or rare bytes does not give this back
    " a  b\n\n\tIF if 1234  don't\r\n \u00e9 e\u0301 \ufb01 \u212b \u6f22\u5b57 \u0e01 \U0001f600 \x00\x7f\u2581x "
)

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """How text becomes tokens, and what a token stands for.

    name: as the user named it: `bytes`, a file or a folder.
    fingerprint: `bytes`, or a hash of all that the tokens depend on.
    boundary: id of the token that closes a document.
    special: text -> id of the tokens that no text becomes: documents and turns are marked with them.
    pieces: id -> the bytes it is written as; `vocab_size` of them.
    lengths: (vocab_size,) int32, bytes of text that a token stands for; 0 for special ones.
    encode: text -> (n,) tokens, uint16, or uint32 where more than 65,536 ids ask for it; total, never a special token.
    files: name -> content, what other programs need to know of it; none for `bytes`.
    """

    name: str
    fingerprint: str
    boundary: int
    special: Mapping[str, int]
    pieces: tuple[bytes, ...]
    lengths: npt.NDArray[np.int32]
    encode: Callable[[str], Tokens]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Ids from 0 to the largest: what a model needs at least."""
        return len(self.pieces)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """Of its tokens: the smallest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def spelled(self, token: int) -> bytes:
        """The bytes a token is written as; an id that it does not have is a byte that is no UTF-8."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b"\xff"

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Tokens -> text; special ones are spelled out, what is no UTF-8 or no token becomes U+FFFD."""
        values = np.asarray(tokens, np.int64).reshape(-1).tolist()
        return b"".join(self.spelled(value) for value in values).decode("utf-8", "replace")

    def one(self, token: int) -> Tokens:
        """(1,) token."""
        return as_tokens([token], self.vocab_size)

    def encode_prompt(self, text: str) -> Tokens:
        """Like `encode`, but what spells a special token is that token: a prompt is its author's, not a stranger's."""
        if not self.special:
            return self.encode(text)
        marks = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")")
        parts: list[Tokens] = [
            self.one(self.special[part]) if part in self.special else self.encode(part) for part in marks.split(text)
        ]
        return as_tokens(np.concatenate(parts), self.vocab_size)


def as_tokens(ids: npt.ArrayLike, vocab_size: int) -> Tokens:
    """Ids -> (n,) tokens of the smallest type that holds every id."""
    return np.array(ids, np.uint16) if vocab_size <= 1 << 16 else np.array(ids, np.uint32)


def utf8(text: str) -> bytes:
    """The bytes of a text; a byte that was no UTF-8 (`surrogateescape`) comes back as it was."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair, which stands for nothing
        return HALF_PAIRS.sub("\ufffd", text).encode("utf-8", "surrogateescape")


def encode_bytes(text: str) -> npt.NDArray[np.uint16]:
    """Text -> (n,) tokens, the bytes of its UTF-8; a byte that was none (`surrogateescape`) comes back as it was."""
    return np.frombuffer(utf8(text), np.uint8).astype(np.uint16)


BYTES = Tokenizer(
    name="bytes",
    fingerprint="bytes",
    boundary=BOUNDARY,
    special={},
    pieces=(*(bytes((value,)) for value in range(256)), BOUNDARY_TEXT.encode()),
    lengths=np.array([1] * 256 + [0], np.int32),
    encode=encode_bytes,
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
    given = Path(os.path.expanduser(spec))
    path = given / FILE if given.is_dir() else given
    if not path.is_file():
        came = f"a folder without {FILE}" if given.is_dir() else "no such file"
        raise UserError(f"tokenizer: {printable(given)}: expected bytes, a {FILE} or a folder with one, got {came}")
    try:
        data = read_small(path, MOST_BYTES)
        beside = path.with_name(SETTINGS)
        settings = read_small(beside, MOST_BYTES) if given.is_dir() and beside.is_file() else None
    except OSError as error:
        _refuse(path, "a file that can be read", error.strerror or str(error))
    parsed = None if settings is None else _settings(beside, settings)
    return _parse(str(spec), path, data, parsed)


def kept_tokenizer(folder: str | Path, spec: str, fingerprint: str) -> Tokenizer:
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


def vocab_follows(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; where they name a tokenizer and no model.vocab_size, that of the tokenizer joins them."""
    if "tokenizer" not in given or "model.vocab_size" in given or not given["tokenizer"]:
        return {**given}
    return {**given, "model.vocab_size": open_tokenizer(given["tokenizer"]).vocab_size}


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that has no row for some token."""
    if vocab_size < tokenizer.vocab_size:
        wanted = f"{tokenizer.vocab_size} (the tokens of {printable(tokenizer.name)}) or more"
        raise UserError(f"model.vocab_size: expected {wanted}, got {vocab_size}; leave it away to follow the tokenizer")


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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put the tokenizer's files into a folder, each whole or not at all; `bytes` has none."""
    for name, content in tokenizer.files.items():
        write_bytes(folder / name, content)


def library(who: str) -> Any:
    """The package `tokenizers`, for whoever needs it."""
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
