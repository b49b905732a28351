"""config.json of a Qwen3 or Qwen3-MoE folder <-> ModelConfig; a key that cannot be expressed is refused by name."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tiny_onn_func.config import DYNAMIC_K, ROUTING_RULES, ModelConfig

CONFIG = "config.json"
DENSE, MOE, OWN = "qwen3", "qwen3_moe", "tiny_onn"  # OWN: a model that Qwen3-MoE cannot express (dynamic K, bias)
ARCHITECTURES = {DENSE: "Qwen3ForCausalLM", MOE: "Qwen3MoeForCausalLM", OWN: "TinyOnnForCausalLM"}
SECTION, FORMAT = "tiny_onn", 1  # key of config.json that holds what Hugging Face has no name for, and its version
OWN_SETTINGS: dict[str, Any] = {  # what Qwen3-MoE has no name for -> the value with which it has none to say
    "ngram_order": 1, "value_embeddings": False, "token_bias": False, "logit_softcap": 0.0, "hash_key": "token",
    "hash_weights": "hash", "hash_layers": "all", "gate": "softmax", "shared_expert_intermediate_size": 0,
    "default_outputs": False,
}  # fmt: skip
MAX_CONFIG_BYTES = 1 << 24
MAX_SIZE = 2**31 - 1

Values = Mapping[str, Any]

# Key -> the values that mean what this decoder computes; a missing key is fine unless REQUIRED says otherwise.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # code that comes with the weights: it would say what they mean, and it is never executed
}
MOE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "shared_expert_intermediate_size": (0, None),
    "n_shared_experts": (0, None),
    "num_shared_experts": (0, None),
}
REQUIRED = {"norm_topk_prob": False}  # what a missing key means in transformers, where that is none of the values


def read_config(folder: Path, kinds: Collection[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a folder's config.json: the model's sizes, and all keys.

    A dense Qwen3 (kind DENSE) is a model with one expert, which is its MLP.

    Args:
        kinds: model types to accept, among DENSE, MOE and OWN.

    Raises:
        ValueError: no such file, no JSON object, another architecture, a missing, ill-typed or absurd size, an option
            that this decoder does not compute; one line that names the file and the key.
    """
    path = folder / CONFIG
    values = read_json(path, MAX_CONFIG_BYTES)
    try:
        return _parse(values, kinds), values
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None


def config_values(config: ModelConfig, kind: str, dtype: str, extra: Values | None = None) -> dict[str, Any]:
    """Build the entries of config.json for a model, in the spelling that every version of transformers reads.

    Args:
        kind: MOE, or OWN for a model that Qwen3-MoE cannot express.
        dtype: of the weights, as `float32`.
        extra: further keys, `max_position_embeddings` or token ids.
    """
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.moe_intermediate_size,  # of dense layers, of which there are none
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        **(extra or {}),
        SECTION: {
            "format": FORMAT,
            "min_experts_per_tok": config.min_experts_per_tok,
            "max_experts_per_tok": config.max_experts_per_tok,
            "routing": config.routing,
            **{name: getattr(config, name) for name in (*OWN_SETTINGS, "ngram_buckets") if kind == OWN},
        },
    }


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a file of at most `max_bytes`.

    Raises:
        ValueError: no regular file, too large, no JSON, no object; one line that names the file.
    """
    name = shown(path)
    try:
        if not path.is_file():
            raise ValueError(f"{name}: expected a file, got {'no file' if path.exists() else 'nothing'} there")
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{name}: expected at most {max_bytes} bytes, got {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name}: expected a file that can be read, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: expected JSON in UTF-8, got other bytes") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got: {shown(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected a JSON object, got {shown(values)}")
    return values


def shown(value: object, limit: int = 200) -> str:
    """Show a value of an untrusted file on one line of bounded length."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Path | Exception) else _repr(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


# Reading --------------------------------------------------------------------------------------------------------------


def _parse(values: Values, kinds: Collection[str]) -> ModelConfig:
    kind = _check_kind(values, kinds)
    for key, allowed in (OPTIONS if kind == DENSE else OPTIONS | MOE_OPTIONS).items():
        value = values.get(key, REQUIRED.get(key, allowed[0]))
        if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in allowed):
            raise ValueError(
                f"{key}: expected {_repr(allowed[0])}, the only kind this decoder computes, got {shown(value)}"
            )
    layers = values.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise ValueError(f"layer_types: expected full_attention only, got {shown(layers)}")
    sizes: dict[str, Any] = {key: _whole(values, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = _whole(values, "num_attention_heads")
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": _whole(values, "num_key_value_heads", heads)}
    head_dim = 128 if kind == DENSE else sizes["hidden_size"] // heads  # the defaults of the two architectures
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings: expected true or false, got {shown(tied)}")
    return ModelConfig(
        **sizes,
        head_dim=_whole(values, "head_dim", head_dim),
        **(_dense_sizes(values) if kind == DENSE else _moe_sizes(values, kind)),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(values),
        tie_word_embeddings=tied,
    )


def _check_kind(values: Values, kinds: Collection[str]) -> str:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        advice = "; `tiny-onn surgery` makes experts of a dense Qwen3" if kind == DENSE else ""
        advice = "; this model has experts already" if kind in (MOE, OWN) else advice
        raise ValueError(f"model_type: expected {' or '.join(kinds)}, got {shown(kind)}{advice}")
    named = values.get("architectures") or [ARCHITECTURES[kind]]
    if named != [ARCHITECTURES[kind]]:
        raise ValueError(f"architectures: expected [{ARCHITECTURES[kind]!r}], got {shown(named)}")
    return kind


def _dense_sizes(values: Values) -> dict[str, Any]:
    return dict(moe_intermediate_size=_whole(values, "intermediate_size"), num_experts=1, num_experts_per_tok=1)


def _moe_sizes(values: Values, kind: str) -> dict[str, Any]:
    """Sizes of the experts; `num_local_experts` is another spelling of `num_experts`, our section has the rest."""
    counts = {key: _whole(values, key) for key in ("num_experts", "num_local_experts") if key in values}
    if len({*counts.values()}) > 1:
        raise ValueError(
            f"num_local_experts: expected num_experts ({counts['num_experts']}) again, got {shown(counts)}"
        )
    experts = next(iter(counts.values())) if counts else _whole(values, "num_experts")
    lowest = DYNAMIC_K if kind == OWN else 1
    sizes: dict[str, Any] = dict(moe_intermediate_size=_whole(values, "moe_intermediate_size"), num_experts=experts)
    sizes["num_experts_per_tok"] = _whole(values, "num_experts_per_tok", lowest=lowest)
    section = values.get(SECTION)
    if section is None:
        return sizes
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        raise ValueError(f"{SECTION}: expected an object with format {FORMAT}, got {shown(section)}")
    cap = section.get("max_experts_per_tok")
    sizes["max_experts_per_tok"] = None if cap is None else _whole(section, "max_experts_per_tok")
    routing, known = section.get("routing", "router"), ROUTING_RULES if kind == OWN else ("router",)
    if routing not in known:
        raise ValueError(f"routing: expected {' or '.join(known)}, got {shown(routing)}")
    least = _whole(section, "min_experts_per_tok", 1)
    own = {name: section[name] for name in (*OWN_SETTINGS, "ngram_buckets") if name in section}
    if kind != OWN and own:
        raise ValueError(f"{min(own)}: expected no such key with model_type {MOE}, got {shown(own[min(own)])}")
    return sizes | own | {"min_experts_per_tok": least, "routing": routing}


def _rope_theta(values: Values) -> float:
    """The base of the rotary frequencies: `rope_theta`, or `rope_parameters.rope_theta`; no scaling of any kind."""
    thetas = [_number(values, "rope_theta")] if values.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{key}: expected an object, got {shown(rope)}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = rope.keys() <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or not known or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{key}: expected plain rotary positions (rope_type default), got {shown(rope)}")
        thetas += [_number(rope, "rope_theta")] if rope.get("rope_theta") is not None else []
    if len({*thetas}) > 1:
        raise ValueError(f"rope_theta: expected one value, got {shown(thetas)}")
    return thetas[0] if thetas else 10000.0


def _whole(values: Values, key: str, default: int | None = None, lowest: int = 1) -> int:
    value = values.get(key, default)
    value = default if value is None else value
    if type(value) is not int or not lowest <= value <= MAX_SIZE:
        raise ValueError(f"{key}: expected a whole number from {lowest} to {MAX_SIZE}, got {_came(values, key)}")
    return value


def _number(values: Values, key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300 or math.isnan(value):
        raise ValueError(f"{key}: expected a number above 0, got {_came(values, key)}")
    return float(value)


def _came(values: Values, key: str) -> str:
    return shown(values[key]) if key in values else "no such key"


def _repr(value: object) -> str:
    """Show a value as JSON; an int of thousands of digits by its bits, as Python refuses to print it in decimal."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    try:
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return type(value).__name__
