"""Text -> RunConfig: YAML files and command-line flags on one path of checks, every error one line that names the key.

A setting has one dotted name, `steps` or `model.hidden_size`: nested in YAML (`model:` / `hidden_size:`), a flag on the
command line (`--model.hidden-size`), a key of the overrides of a study. Flags win over the YAML, the YAML over the
defaults of RunConfig. This is the only file that imports pydantic and tyro.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tiny_onn_func.config import ModelConfig
from training.data.hf_tokenizer import vocab_follows
from training.errors import UserError, flag
from training.presets.find import resolve_preset
from training.run.config import DEFAULT_HYPER, HyperSettings, RunConfig, default_out
from training.run.initial_state import sizes_follow
from training.run.suggest import advice
from training.step.hyper_params import HyperParams, field_texts
from training.storage.plain_yaml import read_yaml, scalar, shown, write_yaml
from training.terminal import set_verbosity

Values = dict[str, Any]  # dotted key -> value
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
LISTED = "; `tiny-onn train --help` lists them all"
SWITCHES = {
    "--resume": "resume", "--help": "help", "-h": "help", "--quiet": "quiet", "-q": "quiet", "--verbose": "verbose",
    "-v": "verbose",
}  # fmt: skip
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


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

    The log follows `--quiet` and `--verbose`. `--resume` without `--config` goes on with the run folder's own
    config.yaml. `--help` prints the flags and exits.

    Raises:
        UserError: an unknown flag, a missing or bad value, or what `load_settings` raises.
        SystemExit: status 0, after --help.
    """
    flags, path, switches = _read_flags(argv)
    config = _resolve(path, flags, flag)
    if "help" in switches:
        _print_help(config)
    set_verbosity(quiet="quiet" in switches, verbose="verbose" in switches)
    out = config.out or default_out(config, Path(path).stem if path else "train")
    saved = Path(out, "config.yaml")
    resume = "resume" in switches
    if resume and path is None and saved.is_file():
        config = _resolve(str(saved), flags, flag)
    return replace(config, out=out), resume


def save_settings(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write every setting as YAML, all of it or nothing; `load_settings` reads the same RunConfig back."""
    write_yaml(asdict(config), path)


def key_types() -> dict[str, Any]:
    """Dotted key -> type of its value, for every setting, in the order of RunConfig."""
    return _types(RunConfig, "")


def _types(kind: type, prefix: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for key, hint in get_type_hints(kind).items():
        nested = isinstance(hint, type) and is_dataclass(hint)
        types |= _types(hint, f"{prefix}{key}.") if nested else {f"{prefix}{key}": hint}
    return types


# Checks ---------------------------------------------------------------------------------------------------------------


def _resolve(path: str | None, overrides: Mapping[str, Any], spell: Callable[[str], str]) -> RunConfig:
    """Defaults, then the file, then the overrides, whose keys `spell` names as the user wrote them."""
    settings = checked(_read_file(path), lambda key: f"{path}: {key}") if path is not None else {}
    asked = checked(overrides, spell)
    if (settings | asked).get("init"):
        settings = sizes_follow(settings | asked)
    else:
        wanted = vocab_follows(asked)
        settings = (settings if "model.vocab_size" in wanted else vocab_follows(settings)) | wanted
    values: dict[str, Any] = asdict(RunConfig())
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    try:
        model, hyper = ModelConfig(**values.pop("model")), HyperSettings(**values.pop("hyper"))
        return RunConfig(**values, model=model, hyper=hyper)
    except ValueError as error:  # out of range: "key: expected ..., got ..."
        key, _, text = str(error).partition(": ")
        place = spell(key) if key in overrides or path is None else f"{path}: {key}"
        raise UserError(f"{place}: {text}") from None


def checked(values: Mapping[str, Any], place: Callable[[str], str]) -> Values:
    """The values with their types enforced: no text for numbers, no booleans for integers, no NaN."""
    types, checked = key_types(), {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{place(key)}: unknown key{advice(key, types, LISTED)}")
        try:
            checked[key] = TypeAdapter(types[key], config=STRICT).validate_python(value)
        except ValidationError:
            raise UserError(f"{place(key)}: expected {_wanted(types[key])}, got {shown(value)}") from None
    return checked


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    kinds = get_args(hint) or (hint,)
    return " or ".join("null" if kind is type(None) else WORDS[kind] for kind in kinds)


# YAML -----------------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> Values:
    """A YAML file as {dotted key: value}, unchecked."""
    values: Values = {}
    sections = {key.partition(".")[0] for key in key_types() if "." in key}
    for key, value in read_yaml(path).items():
        pairs = {_name(key): value}
        if key in sections:
            if not isinstance(value, dict | None):
                raise UserError(f"{path}: {key}: expected keys and values below it, got {shown(value)}")
            pairs = {f"{key}.{_name(inner)}": leaf for inner, leaf in (value or {}).items()}
        if twice := values.keys() & pairs.keys():
            raise UserError(f"{path}: {min(twice)} is given twice")
        values |= pairs
    return values


def _name(key: object) -> str:
    return str(key) if str(key).isprintable() else repr(key)


# Command line ---------------------------------------------------------------------------------------------------------


def _read_flags(argv: Sequence[str]) -> tuple[Values, str | None, set[str]]:
    """`--key value`, `--key=value` and switches -> ({dotted key: value}, the config file, the switches)."""
    types, values, switches = key_types() | {"config": str}, {}, set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in SWITCHES:
            switches.add(SWITCHES[word])
            continue
        name, equals, text = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise UserError(f"{_name(word)}: expected a flag, such as --steps 100")
        if name in SWITCHES:
            raise UserError(f"{name}: expected no value, got {shown(text)}")
        if key not in types:
            raise UserError(f"{_name(name)}: unknown flag{advice(key, [*types, *SWITCHES.values()], LISTED, flag)}")
        if not equals:
            if not words:
                raise UserError(f"{name}: expected a value, got nothing")
            if words[0].startswith("--"):
                came = _name(words[0])
                raise UserError(f"{name}: expected a value, got {came}; if that is meant, write {name}={came}")
            text = words.pop(0)
        values[key] = scalar(text) if {int, float, bool} & {types[key], *get_args(types[key])} else text
    config = values.pop("config", None)
    return values, None if config is None else resolve_preset(config), switches


def _print_help(config: RunConfig) -> NoReturn:
    """Print every flag with its meaning and its value in `config`, and exit with status 0."""
    import tyro  # half a second that only --help needs

    def columns(kind: type, texts: Mapping[str, str]) -> list[tuple[str, Any]]:
        return [(field.name, Annotated[field.type, tyro.conf.arg(help=texts[field.name])]) for field in fields(kind)]

    plain = [f"{key} {getattr(HyperSettings(), key):g}" for key in differing(DEFAULT_HYPER, HyperSettings())]
    about = {"__doc__": "Numbers of the hyper step."}
    said = f"The defaults of hyper are those of a run; HyperParams() of Python has {', '.join(plain)}, no cosine."
    numbers = make_dataclass("Numbers", columns(HyperSettings, field_texts(HyperParams)), namespace=about)
    file = Annotated[
        str | None,
        tyro.conf.arg(
            help="YAML file of settings, or the name of a preset such as small; flags win.", metavar="FILE.yaml"
        ),
    ]
    switches = {
        "resume": ("Go on from the newest checkpoint in the run folder.", None),
        "quiet": ("Print errors and the result alone.", ["-q"]),
        "verbose": ("Print details and tracebacks, too.", ["-v"]),
    }
    own: list[Any] = [
        ("config", file, None),
        *(
            (name, Annotated[bool, tyro.conf.arg(help=text, metavar="", aliases=aliases)], False)
            for name, (text, aliases) in switches.items()
        ),
        ("hyper", numbers),
    ]
    page = make_dataclass("Page", own, bases=(RunConfig,), frozen=True)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    tyro.cli(
        page,
        args=["--help"],
        prog="tiny-onn train",
        description=f"Train a Tiny-ONN. Every key of the YAML is also a flag. {said}",
        default=page(**values | {"hyper": numbers(**asdict(config.hyper))}),
        config=(tyro.conf.FlagConversionOff,),
    )
    raise SystemExit(0)


def differing(ours: HyperSettings, theirs: HyperSettings) -> list[str]:
    """Names of the numbers in which two settings differ."""
    return [field.name for field in fields(HyperSettings) if getattr(ours, field.name) != getattr(theirs, field.name)]
