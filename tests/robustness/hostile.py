"""Files that are right, spoilt: bytes flipped, cut, doubled; values replaced; pipes and links put where they were."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 0.5, True]
TEXTS = [
    "", " ", "\x00", "\n", "a\nb", "\x1b[31m", "\u202e", "\ud800", "💥" * 9, "x" * 70_000, "../../x", "/etc/passwd",
    "~", "NaN", "null", "{}", "[]", "%s%n", "{0.__class__}", "<script>alert(1)</script>", "!!python/object:os.system",
    "*a", "&a",
]  # fmt: skip
INSERTS = (b"\x00", b"\xff\xfe", b"\n", b"\xef\xbb\xbf", b"{", b"[" * 3000, b"9" * 400)
NAMES = [
    "../escaped",
    "/tmp/escaped",
    "a/../../b",
    "con",
    ".",
    "..",
    "",
    "x" * 300,
    "\x00",
    "model.safetensors/..",
    "~root",
]


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four small faults."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(data) + 1), min(len(data), draw.choice((1, 2, 8, 64, 1024)))
        part = data[at : at + length]
        data = draw.choice((
            data[:at] + bytes(draw.randrange(256) for _ in part[:16]) + data[at + len(part[:16]) :],
            data[:at],
            data[:at] + data[at + length :],
            data[:at] + part * draw.choice((2, 50)) + data[at:],
            data[:at] + draw.choice(INSERTS) + data[at:],
            bytes(data[:at][::-1]) + data[at:],
        ))  # fmt: skip
    return data


def hostile(draw: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects."""
    kind = draw.randrange(8)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind < 4:
        return draw.choice(TEXTS)
    if kind == 4:
        return None
    if kind == 5:
        return draw.choice(NAMES)
    if depth > 2:
        return []
    if kind == 6:
        return [hostile(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(TEXTS[:10] + NAMES): hostile(draw, depth + 1) for _ in range(draw.randrange(3))}


def spoil_values(value: Any, draw: random.Random) -> Any:
    """The same nest with one place changed: a value, a key, one more, one less, or two swapped."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice([*value])
        what = draw.randrange(10)
        if what < 6:
            return value | {key: spoil_values(value[key], draw)}
        if what == 6:
            return {k: v for k, v in value.items() if k != key}
        if what == 7:
            return {draw.choice(TEXTS[:8] + NAMES) if k == key else k: v for k, v in value.items()}
        if what == 8:
            return value | {key: value[draw.choice([*value])]}
        return value | {f"{key}{draw.choice(TEXTS[:6])}x": hostile(draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return draw.choice((
            [*value[:at], spoil_values(value[at], draw), *value[at + 1 :]], value[:at], value * 3,
            [*value, hostile(draw)],
        ))  # fmt: skip
    return hostile(draw)


def spoil_file(path: Path, draw: random.Random) -> None:
    """Put something else where a file is."""
    kind = draw.random()
    data = path.read_bytes()
    if kind < 0.04:
        path.unlink()
        draw.choice((
            path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: path.symlink_to("/etc/passwd"),
            lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path.parent), lambda: None,
        ))()  # fmt: skip
    elif kind < 0.5 and path.suffix in (".json", ".jsonl", ".yaml", ".index.json"):
        path.write_bytes(_spoilt_text(path.suffix, data, draw))
    elif kind < 0.75 and path.suffix == ".safetensors":
        path.write_bytes(_spoilt_header(data, draw))
    else:
        path.write_bytes(spoil_bytes(data, draw))


def _spoilt_text(suffix: str, data: bytes, draw: random.Random) -> bytes:
    text = data.decode()
    if suffix == ".jsonl":
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(spoil_values(json.loads(lines[at]), draw))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    values = spoil_values(YAML(typ="safe", pure=True).load(text) if suffix == ".yaml" else json.loads(text), draw)
    if suffix == ".json":
        return json.dumps(values, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.allow_unicode = draw.random() < 0.5
    try:
        yaml.dump(values, out)
        return out.getvalue().encode("utf-8", "surrogatepass")
    except (YAMLError, UnicodeError):
        return json.dumps(values).encode()


def _spoilt_header(data: bytes, draw: random.Random) -> bytes:
    """safetensors: eight bytes of length, JSON, tensors; a header that lies."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(spoil_values(json.loads(data[8 : 8 + size]), draw)).encode("utf-8", "surrogatepass")
    length = draw.choice((len(header), len(header), len(header), size, 2**63, 0, len(data)))
    return length.to_bytes(8, "little") + header + data[8 + size :]
