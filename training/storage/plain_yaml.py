"""YAML in and out, with scalars that mean what they look like and errors of one line.

Even YAML 1.2 reads 0x10 as 16, 017 as 17 and none as text, and some readers take 1:30 for 90 or 1e-3 for text. Here
numbers are Python's decimal ones, true and false the only booleans, null (also ~ and none) the only null, and all else
is text; a key may be given only once.
"""

import io
import os
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter, SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from training.errors import UserError
from training.storage.atomic import write_text
from training.storage.regular_file import read_small

MOST_BYTES, MOST_VALUES = 1 << 18, 100_000  # of a file; in it, with its aliases written out
MOST_LEVELS = 50  # of values in values; reading takes the square of it
WIDTH = 120
TAGGED = (
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)  # what !!bool x, !!float '', %YAML 1.9 raise
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
        document = _plain(YAML(typ="safe", pure=True)).load(read_small(path, MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        came = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"{path}: expected UTF-8 text, got {came}; save it as UTF-8") from None
    except (YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
    except TAGGED as error:
        raise UserError(f"{path}: expected values that fit their tags, got: {error}; remove the tags (!!...)") from None
    if not isinstance(document, dict):
        came = "an empty file" if document is None else shown(document)
        raise UserError(f"{path}: expected keys and values, such as `steps: 100`, got {came}")
    return document


def yaml_text(values: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """A mapping as YAML that `read_yaml` reads back.

    Args:
        comments: {dotted key: what stands above it}.
    """
    text = io.StringIO()
    yaml = _plain(YAML(typ="rt", pure=True))
    # ruamel.yaml loses U+0085 where it is not escaped, and folds a quoted text without the backslash that joins it
    yaml.Representer, yaml.allow_unicode, yaml.width = _Representer, False, 1 << 31
    yaml.dump(_commented(values, comments or {}, ""), text)
    return text.getvalue()


def write_yaml(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a mapping as YAML that `read_yaml` reads back; the file appears whole or not at all."""
    write_text(path, yaml_text(values))


def scalar(text: str) -> Any:
    """The value of one plain scalar: "1e-3" -> 0.001, "none" -> None, "def" -> "def"."""
    yaml = _plain(YAML(typ="safe", pure=True))
    tag = yaml.resolver.resolve(ScalarNode, text, (True, False))
    return yaml.constructor.construct_object(ScalarNode(tag, text))


def shown(value: object, limit: int = 60) -> str:
    """A value as a message quotes it: its repr, one line, not long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _plain(yaml: YAML) -> YAML:
    yaml.Resolver, yaml.Composer = _Resolver, _Composer
    yaml.composer.warn_double_anchors = False
    return yaml


def _commented(values: Mapping[str, Any], comments: Mapping[str, str], prefix: str) -> CommentedMap:
    depth, lines = 2 * prefix.count("."), CommentedMap()
    for key, value in values.items():
        lines[key] = _commented(value, comments, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        if text := comments.get(prefix + key):
            lines.yaml_set_comment_before_after_key(key, textwrap.fill(text, WIDTH - depth - 2), indent=depth)
    return lines


class _Resolver(VersionedResolver):
    processing_version, versioned_resolver = (1, 2), PLAIN  # whatever %YAML says


class _Composer(Composer):
    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels += 1
        if self.levels > MOST_LEVELS:
            problem = f"expected at most {MOST_LEVELS} levels of values in values, got more"
            raise ComposerError(None, None, problem, self.parser.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:  # nine lines can stand for a billion
            problem = f"expected at most {MOST_VALUES:,} values, got more, or an alias that holds itself"
            raise ComposerError(None, None, problem, node.start_mark)
        return node


class _Representer(RoundTripRepresenter):
    pass


_Representer.add_representer(type(None), SafeRepresenter.represent_none)  # `null`, not nothing


def _values(node: Node, known: dict[int, float]) -> float:
    """Number of values that a node stands for with its aliases written out; infinity if one holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [] if isinstance(node, ScalarNode) else node.value
        inner = [part for pair in parts for part in pair] if isinstance(node, MappingNode) else parts
        known[id(node)] = 1.0 + sum(_values(part, known) for part in inner)
    return known[id(node)]
