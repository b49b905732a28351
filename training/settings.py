"""Text -> RunConfig: YAML files and command-line flags on one path of checks, every error one line that names the key.

A setting has one dotted name, `steps` or `model.hidden_size`: nested in YAML (`model:` / `hidden_size:`), a flag on the
command line (`--model.hidden-size`), a key of the overrides of a study. Flags win over the YAML, the YAML over the
defaults of RunConfig. This is the only file that imports pydantic and tyro.
"""

import ast
import difflib
import inspect
import os
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tiny_onn_func.config import ModelConfig
from training.errors import UserError
from training.hyper import HyperParams
from training.run_config import HyperSettings, RunConfig, default_out, hyper_params

__all__ = [
    "HyperSettings",
    "RunConfig",
    "default_out",
    "hyper_params",
    "key_types",
    "load_settings",
    "parse_train_args",
    "save_settings",
]

Values = dict[str, Any]  # dotted key -> value
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
# What a plain scalar means, for reader and writer alike: YAML 1.1 would read 1e-3 as text, `on` as true, 1:30 as 90.
PLAIN = {
    None: [  # whatever its first character
        ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|none|None|)\Z")),
        ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
        ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]{0,17})\Z")),
        ("tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")),
        ("tag:yaml.org,2002:float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")),
    ]
}


def load_settings(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run that a YAML file describes; what it leaves out has the defaults of RunConfig.

    Args:
        path: the YAML file; None for the defaults alone.
        overrides: {dotted key: value}; they win over the file.

    Raises:
        UserError: a file that is no YAML mapping, an unknown key, a wrong type, a value out of range.
    """
    return _resolve(path, overrides or {}, str)


def parse_train_args(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The arguments of `tiny-onn train` -> (the run, its `out` filled in; whether to resume it).

    `--resume` without `--config` goes on with the run folder's own config.yaml. `--help` prints the flags and exits.

    Raises:
        UserError: an unknown flag, a missing or bad value, or what `load_settings` raises.
        SystemExit: status 0, after --help.
    """
    flags, path, switches = _read_flags(argv)
    config = _resolve(path, flags, _flag)
    if "help" in switches:
        _print_help(config)
    out = config.out or default_out(config, Path(path).stem if path else "train")
    saved = Path(out, "config.yaml")
    resume = "resume" in switches
    if resume and path is None and saved.is_file():
        config = _resolve(str(saved), flags, _flag)
    return replace(config, out=out), resume


def save_settings(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write every setting as YAML, all of it or nothing; `load_settings` reads the same RunConfig back."""
    text = yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, width=120)
    draft = Path(f"{os.fspath(path)}.tmp")
    draft.write_text(text, encoding="utf-8", newline="\n")
    os.replace(draft, path)


def key_types() -> dict[str, Any]:
    """Dotted key -> type of its value, for every setting, in the order of RunConfig."""
    return _types(RunConfig, "")


def _types(kind: type, prefix: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for key, hint in get_type_hints(kind).items():
        types |= _types(hint, f"{prefix}{key}.") if is_dataclass(hint) else {f"{prefix}{key}": hint}
    return types


# Checks ---------------------------------------------------------------------------------------------------------------


def _resolve(path: str | None, overrides: Mapping[str, Any], spell: Callable[[str], str]) -> RunConfig:
    """Defaults, then the file, then the overrides, whose keys `spell` names as the user wrote them."""
    given = _checked(_read_yaml(path), lambda key: f"{path}: {key}") if path is not None else {}
    given |= _checked(overrides, spell)
    values: dict[str, Any] = asdict(RunConfig())
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    try:
        model, hyper = ModelConfig(**values.pop("model")), HyperSettings(**values.pop("hyper"))
        return RunConfig(**values, model=model, hyper=hyper)
    except ValueError as error:  # out of range: "key: expected ..., got ..."
        key, _, text = str(error).partition(": ")
        place = spell(key) if key in overrides or path is None else f"{path}: {key}"
        raise UserError(f"{place}: {text}") from None


def _checked(values: Mapping[str, Any], place: Callable[[str], str]) -> Values:
    """The values with their types enforced: no text for numbers, no booleans for integers, no NaN."""
    types, checked = key_types(), {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{place(key)}: unknown key{_suggestion(key, types)}")
        try:
            checked[key] = TypeAdapter(types[key], config=STRICT).validate_python(value)
        except ValidationError:
            came = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            raise UserError(f"{place(key)}: expected {_wanted(types[key])}, got {came}") from None
    return checked


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    kinds = get_args(hint) or (hint,)
    return " or ".join("null" if kind is type(None) else WORDS[kind] for kind in kinds)


def _suggestion(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else "; `tiny-onn train --help` lists them all"


# YAML -----------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of PLAIN, which refuses a key that is given twice."""

    yaml_implicit_resolvers = PLAIN

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"{key_node.value}: given twice", key_node.start_mark)
            seen |= {key_node.value} if isinstance(key_node, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = PLAIN


def _read_yaml(path: str) -> Values:
    """A YAML file as {dotted key: value}, unchecked."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file of settings, got: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}:{f' line {mark.line + 1}:' if mark else ''} no valid YAML: {problem}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected settings such as `steps: 100`, got {'nothing' if document is None else 'none'}")
    values: Values = {}
    sections = {key.partition(".")[0] for key in key_types() if "." in key}
    for key, value in document.items():
        pairs = {_shown(key): value}
        if key in sections:
            if not isinstance(value, dict | None):
                raise UserError(f"{path}: {key}: expected settings below it, such as `{key}: {{...}}`, got {value!r}")
            pairs = {f"{key}.{_shown(inner)}": leaf for inner, leaf in (value or {}).items()}
        if twice := values.keys() & pairs.keys():
            raise UserError(f"{path}: {min(twice)}: given twice")
        values |= pairs
    return values


def _shown(key: Any) -> str:
    return str(key) if str(key).isprintable() else repr(key)


# Command line ---------------------------------------------------------------------------------------------------------


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _read_flags(argv: Sequence[str]) -> tuple[Values, str | None, set[str]]:
    """`--key value`, `--key=value`, `--resume`, `--help` -> ({dotted key: value}, the config file, the switches)."""
    types, values, switches = key_types() | {"config": str}, {}, set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--resume", "--help", "-h"):
            switches |= {"resume" if word == "--resume" else "help"}
            continue
        name, equals, text = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise UserError(f"{_shown(word)}: expected a flag, such as --steps 100")
        if key not in types:
            known = [_flag(key) for key in types] + ["--resume", "--help"]
            raise UserError(f"{_shown(name)}: unknown flag{_suggestion(name, known)}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{name}: expected a value, got {_shown(words[0]) if words else 'nothing'}")
            text = words.pop(0)
        values[key] = _scalar(text) if {int, float, bool} & {types[key], *get_args(types[key])} else text
    return values, values.pop("config", None), switches


def _scalar(text: str) -> Any:
    """The value of a flag, read as YAML reads a plain scalar."""
    loader = _Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def _print_help(config: RunConfig) -> None:
    """Print every flag with its meaning and its value in `config`, and exit with status 0."""
    import tyro  # half a second that only --help needs

    texts = _field_texts(HyperParams)
    hyper = make_dataclass(
        "Numbers",
        [
            (field.name, Annotated[field.type, tyro.conf.arg(help=texts[field.name])], getattr(config.hyper, field.name))
            for field in fields(HyperSettings)
        ],
        namespace={"__doc__": "Numbers of the hyper step."},
        frozen=True,
    )
    file = Annotated[str | None, tyro.conf.arg(help="YAML file of settings; flags win over it.", metavar="FILE.yaml")]
    switch = Annotated[bool, tyro.conf.arg(help="Go on from the newest checkpoint of the run folder.", metavar="")]
    parts = [("config", file, None), ("resume", switch, False), ("hyper", hyper, hyper())]
    page = make_dataclass("Page", parts, bases=(RunConfig,), frozen=True)
    default = page(**{field.name: getattr(config, field.name) for field in fields(config)} | {"hyper": hyper()})
    about = "Train a Tiny-ONN: every key of the YAML is also a flag."
    tyro.cli(page, args=["--help"], prog="tiny-onn train", description=about, default=default,
             config=(tyro.conf.FlagConversionOff,))


def _field_texts(kind: type) -> dict[str, str]:
    """Field -> the text that stands under it in the source of its class."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
