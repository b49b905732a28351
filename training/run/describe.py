"""Describe the settings: help page, the resolved configuration as YAML, JSON schema for editors, shell completion."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import make_dataclass
from typing import Annotated, Any, NoReturn

from pydantic import TypeAdapter

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import flatten
from training.fields import field_texts
from training.run.config import DEFAULT_HYPER, KEYS, RunConfig, plain_values
from training.step.hyper_params import HyperParams
from training.storage.plain_yaml import yaml_text

SECTIONS = ("model", "hyper")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
SWITCHES = {  # of `tiny-onn train`, beside the settings
    "resume": "Go on from the newest checkpoint in the run folder.",
    "quiet": "Print errors and the result alone.",
    "verbose": "Print details and tracebacks, too.",
    "print_config": "Print these settings as YAML that --config takes, each with its meaning, and train nothing.",
    "print_schema": "Print the JSON schema of a YAML file of settings, for editors, and train nothing.",
}


def describe(what: str, config: RunConfig) -> NoReturn:
    """Print the help page, the configuration or the schema, and exit with status 0."""
    if what == "help":
        print_help(config)
    schema = {"$schema": DRAFT, "title": "Settings of tiny-onn train"} | settings_schema()
    page = json.dumps(schema, indent=1) + "\n" if what == "print_schema" else yaml_text(plain_values(config), texts())
    print(page, end="")
    raise SystemExit(0)


def texts() -> dict[str, str]:
    """Dotted key -> what it means, for every setting and section."""
    sections = {"model": field_texts(ModelConfig), "hyper": field_texts(HyperParams)}
    return {key: " ".join(text.split()) for key, text in (field_texts(RunConfig) | flatten(sections)).items()}


# JSON schema ----------------------------------------------------------------------------------------------------------


def key_schemas() -> dict[str, dict[str, Any]]:
    """Dotted key -> JSON schema of its value, for every setting."""
    said, defaults = texts(), flatten(plain_values(RunConfig()))
    return {
        key: TypeAdapter(hint).json_schema() | {"description": said[key], "default": defaults[key]}
        for key, hint in KEYS.items()
    }


def settings_schema(without: Iterable[str] = ()) -> dict[str, Any]:
    """JSON schema of a mapping of settings: nested, or with dotted keys.

    Args:
        without: settings that have no meaning there.
    """
    schemas, said = key_schemas(), texts()
    nested: dict[str, Any] = {key: schema for key, schema in schemas.items() if "." not in key and key not in without}
    for section in SECTIONS:
        inner = {key.partition(".")[2]: schema for key, schema in schemas.items() if key.startswith(f"{section}.")}
        nested[section] = object_schema(inner) | {"description": said[section]}
    return object_schema(nested) | {"patternProperties": {rf"^({'|'.join(SECTIONS)})\.": {}}}


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a mapping with these keys and no others, which may also be left empty."""
    return {"type": ["object", "null"], "properties": dict(properties), "additionalProperties": False}


# tyro: half a second that only these need -----------------------------------------------------------------------------


def print_help(config: RunConfig) -> NoReturn:
    """Print every flag with its meaning and its value in `config`, and exit with status 0."""
    import tyro

    plain = [f"{name} {getattr(HyperParams(), name):g}" for name in differing(DEFAULT_HYPER, HyperParams())]
    said = f"The defaults of hyper are those of a run; HyperParams() of Python has {', '.join(plain)}, no cosine."
    page = settings_page()
    values = {"config": None} | dict.fromkeys(SWITCHES, False) | plain_values(config)
    for section in SECTIONS:
        values[section] = page.__annotations__[section](**values[section])
    tyro.cli(
        page,
        args=["--help"],
        prog="tiny-onn train",
        description=f"Train a Tiny-ONN. Every key of the YAML is also a flag. {said}",
        default=page(**values),
    )
    raise SystemExit(0)


def settings_page() -> type:
    """The flags of `tiny-onn train` as a class that tyro reads."""
    from tyro.conf import FlagConversionOff, FlagCreatePairsOff, arg

    said, aliases = texts(), {"quiet": ["-q"], "verbose": ["-v"]}
    about = "YAML file of settings, or the name of a preset such as small; flags win."
    columns: list[Any] = [("config", Annotated[str | None, arg(help=about, metavar="FILE.yaml")])]
    for name, text in SWITCHES.items():
        columns.append((name, Annotated[bool, FlagCreatePairsOff, arg(help=text, aliases=aliases.get(name))]))
    flat = [(key, hint) for key, hint in KEYS.items() if "." not in key]
    columns += [(key, Annotated[hint, FlagConversionOff, arg(help=said[key])]) for key, hint in flat]
    for section in SECTIONS:
        inner = [(key, hint) for key, hint in KEYS.items() if key.startswith(f"{section}.")]
        fields = [
            (key.partition(".")[2], Annotated[hint, FlagConversionOff, arg(help=said[key])]) for key, hint in inner
        ]
        columns.append((section, make_dataclass(section, fields, namespace={"__doc__": said[section]})))
    return make_dataclass("Settings", columns)


def differing(ours: HyperParams, theirs: HyperParams) -> list[str]:
    """Names of the numbers in which two settings differ."""
    return [name for name in HyperParams._fields if getattr(ours, name) != getattr(theirs, name)]
