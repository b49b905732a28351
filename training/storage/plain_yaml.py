"""YAML in and out, with scalars that mean what they look like and errors of one line.

YAML 1.1 reads 1e-3 as text, `on` as true, 017 as 15 and 1:30 as 90. Here numbers are Python's decimal ones, true and
false the only booleans, null (also ~ and none) the only null, and all else is text; a key may be given only once.
"""

import os
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from training.errors import UserError
from training.storage.atomic import write_text
from training.storage.regular_file import read_small

MOST_BYTES, MOST_VALUES = 1 << 18, 100_000  # of a file; in it, with its aliases written out
PLAIN = {
    None: [  # whatever the first character is; the first pattern that matches decides
        ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|none|None|)\Z")),
        ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
        ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]{0,18})\Z")),  # what may fit 64 bits
        ("tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")),
        ("tag:yaml.org,2002:float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")),
    ]
}


def read_yaml(path: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: the file cannot be read, is no YAML, gives a key twice, or holds no mapping.
    """
    try:
        document = yaml.load(read_small(path, MOST_BYTES).decode("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        came = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"{path}: expected UTF-8 text, got {came}; save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
    if not isinstance(document, dict):
        came = "an empty file" if document is None else shown(document)
        raise UserError(f"{path}: expected keys and values, such as `steps: 100`, got {came}")
    return document


def write_yaml(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a mapping as YAML that `read_yaml` reads back; the file appears whole or not at all."""
    write_text(path, yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=120))


def scalar(text: str) -> Any:
    """The value of one plain scalar: "1e-3" -> 0.001, "none" -> None, "def" -> "def"."""
    loader: Any = _Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def shown(value: object, limit: int = 60) -> str:
    """A value as a message quotes it: its repr, one line, not long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = PLAIN

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:  # nine lines can stand for a billion
            problem = f"expected at most {MOST_VALUES:,} values, got more, or an alias that holds itself"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values that a node stands for with its aliases written out; infinity if one holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1.0 + sum(_values(part, known) for part in inner)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = PLAIN
