"""Model card of an exported run: data, sizes, score, router rule, limits, as the README.md of its folder."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.params import count_active_params, count_params
from training.data.hub import PREFIX
from training.data.mixture import parse_mixture
from training.data.sources import STDLIB
from training.errors import UserError, one_line
from training.run.config import RunConfig
from training.step.hyper_params import HyperParams
from training.storage.checkpoint_files import version
from training.storage.regular_file import read_object

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$-])")  # of Markdown and HTML
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of this repository
model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""


def model_card(run: str | Path, config: RunConfig, model: ModelConfig) -> str:
    """README.md of a run's export.

    Args:
        run: its folder, whose summary.json has the score; without one the card says that there is none.
        model: as exported; its K may differ from the run's.
    """
    summary = _summary(run)
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "tiny-onn"],
    }
    parts = {
        "Data": _table(_data(config, summary)),
        "Size": _table(_sizes(model, config)),
        "Score": _score(summary, config, model),
        "Router rule": _table(_rule(config)),
        "Use": USE,
        "Limits": "\n".join(f"- {limit}" for limit in _limits(config, model)),
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    intro = f"A Mixture-of-Experts language model, trained by tiny-onn {version()}, in the layout of Qwen3-MoE."
    return f"---\n{front}\n---\n\n# {_plain(Path(run).resolve().name)}\n\n{intro}\n\n{body}\n"


def _summary(run: str | Path) -> Mapping[str, Any]:
    """summary.json, or nothing where it is missing or damaged."""
    try:
        return read_object(Path(run, "summary.json"))
    except (OSError, ValueError):
        return {}


def _data(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, object]:
    tokens = summary.get("tokens")
    return {
        "trained on": ", ".join(_sources(config.data)),
        "held out": f"{config.holdout:g} of it, split: {config.split}",
        "tokenizer": "bytes" if config.tokenizer == "bytes" else "tokenizer.json of this folder",
        "tokens seen": f"{tokens:,}" if isinstance(tokens, int) else "unknown",
    }


def _sources(data: str) -> list[str]:
    """The sources and weights of a run's text; of a file its name alone, not where it lies on somebody's machine."""
    try:
        parts = parse_mixture(data)
    except UserError:  # files that are gone by now
        return [Path(data).name]
    total = sum(weight for _, weight in parts)
    names = [_shown(part.source) for part in parts]
    shares = ["" if len(parts) == 1 else f" ({part.weight / total:.0%})" for part in parts]
    return [name + share for name, share in zip(names, shares, strict=True)]


def _shown(source: str) -> str:
    prefix = PREFIX if source.startswith(PREFIX) else ""
    place = source.removeprefix(prefix)
    public = source == STDLIB or source.startswith(f"{STDLIB}:") or (prefix and not place.startswith((".", "/", "~")))
    return source if public else prefix + Path(place).name


def _sizes(model: ModelConfig, config: RunConfig) -> dict[str, object]:
    active = round(count_active_params(model, float(model.num_experts_per_tok)))
    return {
        "parameters": f"{count_params(model):,}, {active:,} active in a token",
        "layers": model.num_hidden_layers,
        "hidden size": model.hidden_size,
        "experts": f"{model.num_experts} a layer, {model.num_experts_per_tok} for a token",
        "vocabulary": model.vocab_size,
        "context in training": config.sequence_length,
    }


def _score(summary: Mapping[str, Any], config: RunConfig, model: ModelConfig) -> str:
    bits, baselines = summary.get("bits_per_byte"), summary.get("baselines")
    if not isinstance(bits, int | float):
        return "None: the run has no summary of its end."
    rows: dict[str, object] = {"this model": f"{bits:.3f}"}
    if isinstance(baselines, dict):
        rows |= {str(name): f"{value:.3f}" for name, value in baselines.items() if isinstance(value, int | float)}
    said = f"Bits per byte on {summary.get('held_out_bytes')} held-out bytes after {summary.get('steps')} steps:"
    own, here = config.model.num_experts_per_tok, model.num_experts_per_tok
    other = "" if own == here else f"\n\nScored at K = {own}; this folder has K = {here}, which has another score."
    return f"{_plain(said)}\n\n{_table(rows)}{other}"


def _rule(config: RunConfig) -> dict[str, object]:
    """Kind of surprise, and each coefficient of the rule that is not the default of a plain step."""
    plain, hyper = HyperParams()._asdict(), config.hyper._asdict()
    names = [
        "surprise_sign", "surprise_weight", "balance_weight", "z_weight", "router_coupling", "bias_speed",
        "explore_prob", "expert_norm", "target_temperature", "shuffle_targets", "freeze_step", "regenerate_below",
        "distill_alpha",
    ]  # fmt: skip
    target = "least" if hyper["surprise_sign"] > 0 else "most"
    rule = f"each token's {target} surprised expert" if config.hyper.surprise_weight else "none, but other losses"
    changed = {f"hyper.{name}": hyper[name] for name in names if hyper[name] != plain[name]}
    return {"target of the router": rule, "surprise": config.surprise_kind, "routing": config.model.routing, **changed}


def _limits(config: RunConfig, model: ModelConfig) -> list[str]:
    limits = [
        "A base model continues text: it is no assistant, its facts are not reliable, its safety was not tested.",
        f"It saw {config.sequence_length} tokens at a time in training; longer contexts are untested.",
        "It repeats what is in its data, errors and private text among them.",
        "The score is on held-out text of the same source; other text was not measured.",
    ]
    if config.model.num_experts_per_tok != model.num_experts_per_tok:
        own = "dynamic" if config.model.num_experts_per_tok == DYNAMIC_K else config.model.num_experts_per_tok
        limits.append(f"The number of experts of a token was {own} in training; in this folder it is another.")
    return limits


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _plain(value: object) -> str:
    """A value as one line of Markdown in which no character is a mark."""
    return SPECIAL.sub(r"\\\1", one_line(value))
