"""JSON schema of a study file, for editors."""

from typing import Any

from pydantic import TypeAdapter

from training.fields import field_texts
from training.run.describe import DRAFT, key_schemas, object_schema, settings_schema
from training.study.config import IN_BASE, KEYS, QUICK_PARTS, UNUSED, StudyConfig


def study_schema() -> dict[str, Any]:
    """JSON schema of a study file: its own keys, and the settings that base, arms, axes and quick version may name."""
    settings = settings_schema(without={*UNUSED} - {*IN_BASE})
    dotted = {key: schema for key, schema in key_schemas().items() if key not in UNUSED}
    lists = {key: {"type": "array", "items": schema} for key, schema in dotted.items()}
    nested = {section: {"type": "object"} for section in ("model", "hyper")}
    varied = {key: schema for key, schema in settings["properties"].items() if key not in UNUSED} | dotted
    changes, axes = object_schema(varied), object_schema(lists | nested)
    arm = object_schema({"name": {"type": "string", "minLength": 1}, "set": changes}) | {"required": ["name"]}
    parts = {key: TypeAdapter(hint).json_schema() for key, hint in QUICK_PARTS.items()} | {"axes": axes}
    own = {
        key: {"anyOf": [TypeAdapter(hint).json_schema(), {"type": "null"}]}
        for key, hint in KEYS.items()
        if key not in ("arms", "axes", "quick")
    } | {
        "base": settings,
        "arms": {"type": ["array", "null"], "items": arm},
        "axes": axes,
        "quick": object_schema(varied | parts),
    }
    said = {key: {"description": " ".join(text.split())} for key, text in field_texts(StudyConfig).items()}
    keys = {name: own[name] | said[name] for name in said}
    return {"$schema": DRAFT, "title": "A study of tiny-onn"} | object_schema(keys) | {"required": ["margin"]}
