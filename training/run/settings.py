"""Text -> RunConfig: YAML files and command-line flags on one path of checks, every error one line that names the key.

A setting has one dotted name, `steps` or `model.hidden_size`: nested in YAML (`model:` / `hidden_size:`), a flag on the
command line (`--model.hidden-size`), a key of the overrides of a study. Flags win over the YAML, the YAML over the
defaults of RunConfig.

The flags are read here and not by tyro, which draws the help page and completes words in shells (`describe.py`): its
errors are boxes of 7 to 19 lines, without advice for words of other programs, after 0.28 s of processor time.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.huggingface.config import MOE, OWN, read_config
from training.data.hf_tokenizer import vocab_follows
from training.data.tokenizer import FILE
from training.errors import UserError, flag
from training.presets.find import resolve_preset
from training.run.config import KEYS, PLAIN_MODEL, RunConfig, default_out, plain_values
from training.step.hyper_params import HyperParams
from training.storage.plain_yaml import read_yaml, scalar, shown, write_yaml
from training.storage.typed import kinds_of, typed
from training.suggest import advice
from training.terminal import set_verbosity

Values = dict[str, Any]  # dotted key -> value
FIRST = {  # settings of the model that every config.yaml of a run has, whatever version wrote it
    f"model.{name}"
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "moe_intermediate_size", "num_experts", "num_experts_per_tok", "min_experts_per_tok", "max_experts_per_tok",
        "rms_norm_eps", "rope_theta", "tie_word_embeddings", "routing",
    )
}  # fmt: skip
LATER = {key: getattr(PLAIN_MODEL, key[6:]) for key in KEYS if key.startswith("model.") and key not in FIRST}
LISTED = "; `tiny-onn train --help` lists them all"
SWITCHES = {
    "--resume": "resume", "--help": "help", "-h": "help", "--quiet": "quiet", "-q": "quiet", "--verbose": "verbose",
    "-v": "verbose", "--print-config": "print_config", "--print-schema": "print_schema",
}  # fmt: skip


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
    config.yaml. `--help` prints the flags, `--print-config` this run's settings as YAML, `--print-schema` their JSON
    schema; they write nothing and exit.

    Raises:
        UserError: an unknown flag, a missing or bad value, or what `load_settings` raises.
        SystemExit: status 0, after --help, --print-config or --print-schema.
    """
    flags, path, switches = _read_flags(argv)
    config = _resolve(path, flags, flag)
    if asked := switches & {"help", "print_schema"}:
        _describe(min(asked), config)
    set_verbosity(quiet="quiet" in switches, verbose="verbose" in switches)
    out = config.out or default_out(config, Path(path).stem if path else "train")
    saved = Path(out, "config.yaml")
    resume = "resume" in switches
    if resume and path is None and saved.is_file():
        config = _resolve(str(saved), flags, flag)
    if "print_config" in switches:
        _describe("print_config", config)
    return replace(config, out=out), resume


def save_settings(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write every setting as YAML, all of it or nothing; `load_settings` reads the same RunConfig back."""
    write_yaml(plain_values(config), path)


def sizes_follow(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; where they name `init`, sizes and tokenizer of its folder join them, unless given.

    A folder without a tokenizer.json is taken to be of the run's tokenizer, bytes by default.
    """
    keys = {f"model.{field.name}": field.name for field in fields(ModelConfig)}
    if not settings.get("init") or keys.keys() <= settings.keys():  # a run's own settings spell all of them
        return {**settings}
    folder = init_folder(settings["init"])
    config, _ = read_config(folder, (MOE, OWN))
    sizes = {key: getattr(config, name) for key, name in keys.items()}
    return sizes | ({"tokenizer": settings["init"]} if (folder / FILE).is_file() else {}) | {**settings}


def init_folder(name: str) -> Path:
    """Path of the folder that `init` names.

    Raises:
        UserError: there is none.
    """
    if not Path(name).is_dir():
        raise UserError(f"init: expected a folder with a model, got {name}; `tiny-onn surgery` makes one")
    return Path(name)


# Checks ---------------------------------------------------------------------------------------------------------------


def _resolve(path: str | None, overrides: Mapping[str, Any], spell: Callable[[str], str]) -> RunConfig:
    """Defaults, then the file, then the overrides, whose keys `spell` names as the user wrote them."""
    settings = checked(_read_file(path), lambda key: f"{path}: {key}") if path is not None else {}
    if settings.keys() >= FIRST:  # written by a run, perhaps before there were more: its model had none of them
        settings = LATER | settings
    asked = checked(overrides, spell)
    if (settings | asked).get("init"):
        settings = sizes_follow(settings | asked)
    else:
        wanted = vocab_follows(asked)
        settings = (settings if "model.vocab_size" in wanted else vocab_follows(settings)) | wanted
    values: dict[str, Any] = plain_values(RunConfig())
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    try:
        model, hyper = ModelConfig(**values.pop("model")), HyperParams(**values.pop("hyper"))
        return RunConfig(**values, model=model, hyper=hyper)
    except ValueError as error:  # out of range: "key: expected ..., got ..."
        key, _, text = str(error).partition(": ")
        place = spell(key) if key in overrides or path is None else f"{path}: {key}"
        raise UserError(f"{place}: {text}") from None


def checked(values: Mapping[str, Any], place: Callable[[str], str]) -> Values:
    """The values with their types enforced; `place` names a key as the user wrote it."""
    for key in values:
        if key not in KEYS:
            raise UserError(f"{place(key)}: unknown key{advice(key, KEYS, LISTED)}")
    return {key: typed(KEYS[key], value, place(key)) for key, value in values.items()}


# YAML -----------------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> Values:
    """A YAML file as {dotted key: value}, unchecked."""
    values: Values = {}
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
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
    types, values, switches = KEYS | {"config": str}, {}, set()
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
        values[key] = scalar(text) if {int, float, bool} & {*kinds_of(types[key])} else text
    config = values.pop("config", None)
    return values, None if config is None else resolve_preset(config), switches


def _describe(what: str, config: RunConfig) -> NoReturn:
    from training.run.describe import describe  # the classes that only these switches need

    describe(what, config)
