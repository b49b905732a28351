"""Strategies of right files, spoilt: bytes changed, cut, doubled; values replaced; pipes and links in their place."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 0.5, True]
KEYS = ["", " ", "\x00", "\n", "a\nb", "\x1b[31m", "\u202e", "\ud800", "💥" * 9, "x" * 70_000, "../../x", "/etc/passwd"]
TEXTS = [
    *KEYS, "~", "NaN", "null", "{}", "[]", "%s%n", "{0.__class__}", "<script>alert(1)</script>",
    "!!python/object:os.system", "*a", "&a",
]  # fmt: skip
NAMES = [
    "../escaped", "/tmp/escaped", "a/../../b", "con", ".", "..", "", "x" * 300, "\x00", "model.safetensors/..", "~root",
]  # fmt: skip
INSERTS = [b"\x00", b"\xff\xfe", b"\n", b"\xef\xbb\xbf", b"{", b"[" * 3000, b"9" * 400]
SPECIAL: dict[str, Callable[[Path], object]] = {  # no regular files, and links to others
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "another file": lambda path: path.symlink_to("/etc/passwd"),
    "another folder": lambda path: path.symlink_to(path.parent),
    "nothing": lambda path: None,
}

names = st.sampled_from(KEYS + NAMES) | st.text(max_size=8)
scalars = st.none() | st.sampled_from([*NUMBERS, *TEXTS, *NAMES]) | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=2), max_leaves=6)


@st.composite
def spoilt_files(draw: st.DrawFn, path: Path) -> bytes | str:
    """Bytes for a file, or a name of `SPECIAL`."""
    data = path.read_bytes()
    kind = draw(st.sampled_from(["special", *["values"] * 12, *["bytes"] * 12]))
    if kind == "special":
        return draw(st.sampled_from([*SPECIAL]))
    if kind == "values" and path.suffix in (".json", ".jsonl", ".yaml"):
        return draw(spoilt_texts(path.suffix, data))
    if kind == "values" and path.suffix == ".safetensors":
        return draw(spoilt_headers(data))
    for _ in range(draw(st.sampled_from((1, 1, 2, 4)))):
        data = draw(spoilt_bytes(data))
    return data


def put(path: Path, spoilt: bytes | str) -> None:
    """Put what `spoilt_files` drew in the place of a file."""
    if isinstance(spoilt, bytes):
        path.write_bytes(spoilt)
    else:
        path.unlink()
        SPECIAL[spoilt](path)


@st.composite
def spoilt_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """One small fault."""
    at, length = draw(st.integers(0, len(data))), draw(st.sampled_from((1, 2, 8, 64, 1024)))
    before, part, after = data[:at], data[at : at + length], data[at:]
    cut = st.sampled_from([before, before + after[length:], before[::-1] + after])
    doubled = st.sampled_from([2, 50]).map(lambda times: before + part * times + after)
    inserted = st.sampled_from(INSERTS).map(lambda new: before + new + after)
    return draw(cut | doubled | inserted | st.binary(max_size=16).map(lambda new: before + new + after[len(new) :]))


@st.composite
def spoilt_values(draw: st.DrawFn, value: Any) -> Any:
    """The same nest with one place changed: a value, a key, one more, one less, or two alike."""
    if isinstance(value, dict) and value:
        key, other = draw(st.sampled_from([*value])), draw(st.sampled_from([*value]))
        deeper = spoilt_values(value[key]).map(lambda inner: value | {key: inner})
        less = st.just({k: v for k, v in value.items() if k != key})
        renamed = names.map(lambda name: {name if k == key else k: v for k, v in value.items()})
        alike = st.just(value | {key: value[other]})
        more = st.tuples(names, values).map(lambda item: value | {f"{key}{item[0][:9]}x": item[1]})
        return draw(st.one_of(deeper, deeper, deeper, deeper, less, renamed, alike, more, values))
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        deeper = spoilt_values(value[at]).map(lambda inner: [*value[:at], inner, *value[at + 1 :]])
        more = values.map(lambda one: [*value, one])
        return draw(st.one_of(deeper, st.sampled_from([value[:at], value * 3]), more, values))
    return draw(values)


@st.composite
def spoilt_texts(draw: st.DrawFn, suffix: str, data: bytes) -> bytes:
    """JSON or YAML with one place changed; of lines, one of them."""
    text = data.decode()
    if suffix == ".jsonl":
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(draw(spoilt_values(json.loads(lines[at]))))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    new = draw(spoilt_values(YAML(typ="safe", pure=True).load(text) if suffix == ".yaml" else json.loads(text)))
    raw = draw(st.booleans())
    if suffix == ".json":
        return json.dumps(new, ensure_ascii=raw).encode("utf-8", "surrogatepass")
    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.allow_unicode = raw
    try:
        yaml.dump(new, out)
        return out.getvalue().encode("utf-8", "surrogatepass")
    except (YAMLError, UnicodeError):
        return json.dumps(new).encode()


@st.composite
def spoilt_headers(draw: st.DrawFn, data: bytes) -> bytes:
    """safetensors: eight bytes of length, JSON, tensors; a header that lies."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(draw(spoilt_values(json.loads(data[8 : 8 + size])))).encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from((len(header), len(header), len(header), size, 2**63, 0, len(data))))
    return length.to_bytes(8, "little") + header + data[8 + size :]
