"""Text <-> tokens: the bytes themselves, or a byte-level tokenizer.json; a table says which bytes a token stands for.

Any tokenizer here gives back the text it took, so bits per byte mean the same for all: nats over the BYTES of a text.
A folder is not trusted: of it tokenizer.json and tokenizer_config.json are read, as data; no code in it is run.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.data.readers import printable
from training.errors import UserError
from training.storage.atomic import write_bytes

BOUNDARY = 256
BOUNDARY_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 257
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
HALF_PAIRS = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that do not stand for a byte

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Map from text to tokens, and from a token to its bytes.

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
        """Dtype of the tokens: the smallest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def spelled(self, token: int) -> bytes:
        """Bytes of a token's spelling; an unknown id gives a byte that is not UTF-8."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b"\xff"

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Tokens -> text; special ones are spelled out, what is no UTF-8 or no token becomes U+FFFD."""
        values = np.asarray(tokens, np.int64).reshape(-1).tolist()
        return b"".join(self.spelled(value) for value in values).decode("utf-8", "replace")

    def one(self, token: int) -> Tokens:
        """(1,) token."""
        return as_tokens([token], self.vocab_size)

    def encode_prompt(self, text: str) -> Tokens:
        """Like `encode`, but the spelling of a special token becomes that token: the author of a prompt is trusted."""
        if not self.special:
            return self.encode(text)
        marks = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")")
        parts: list[Tokens] = [
            self.one(self.special[part]) if part in self.special else self.encode(part) for part in marks.split(text)
        ]
        return as_tokens(np.concatenate(parts), self.vocab_size)

    def prompt(self, text: str) -> Tokens:
        """Tokens that a text is continued from; an empty one gives the boundary, behind which a document begins."""
        return self.encode_prompt(text) if text else self.one(self.boundary)


def as_tokens(ids: npt.ArrayLike, vocab_size: int) -> Tokens:
    """Ids -> (n,) tokens of the smallest type that holds every id."""
    return np.array(ids, np.uint16) if vocab_size <= 1 << 16 else np.array(ids, np.uint32)


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text; a byte that was not UTF-8 (`surrogateescape`) comes back as it was."""
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


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that has no row for some token."""
    if vocab_size < tokenizer.vocab_size:
        wanted = f"{tokenizer.vocab_size} (the tokens of {printable(tokenizer.name)}) or more"
        raise UserError(f"model.vocab_size: expected {wanted}, got {vocab_size}; leave it away to follow the tokenizer")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put the tokenizer's files into a folder, each whole or not at all; `bytes` has none."""
    for name, content in tokenizer.files.items():
        write_bytes(folder / name, content)
