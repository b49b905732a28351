"""Legs of a run: a resumed run may lay out its learning rates for another total of steps, from that step on.

A cosine that ends at step 600 and one that ends at step 900 differ in every step. A run that is resumed with another
`steps` follows the first one up to the checkpoint and the second one after it: it is neither a run of 600 steps nor one
of 900, and only its legs say how to make it again. Where both schedules have the same rates up to the checkpoint, as
on the plateau of `wsd`, the run is one of 900 steps.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.errors import UserError
from training.run.config import RunConfig, hyper_params
from training.step.optim import schedule as rates
from training.storage.checkpoint_files import read_meta, steps_in

LEGS = "legs"  # in the settings of a checkpoint, and in summary.json


class Leg(NamedTuple):
    """Steps that follow one schedule."""

    start: int  # steps made before it
    steps: int  # the run's `steps` while it lasts


def legs_from(values: object, steps: int) -> tuple[Leg, ...]:
    """Legs as a file holds them, [[start, steps], ...]; a single leg of the whole run if it holds none."""
    if isinstance(values, Sequence) and values and all(_is_leg(value) for value in values):
        return tuple(Leg(*value) for value in values)
    return (Leg(0, steps),)


def _is_leg(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(type(number) is int for number in value)


def legs_of(config: RunConfig, settings: Mapping[str, Any] | None, step: int) -> tuple[Leg, ...]:
    """The legs of a run that goes on after `step` steps.

    Args:
        config: of the run, from now on.
        settings: of the checkpoint that it goes on from, None where there is none.
    """
    if settings is None:
        return (Leg(0, config.steps),)
    before = legs_from(settings.get(LEGS), config.steps)
    kept = [leg for leg in before if leg.start < step] or [Leg(0, config.steps)]
    last = kept[-1]
    if hyper_params(replace(config, steps=last.steps)) == hyper_params(config):
        return tuple(kept)
    if _have_the_same_rates(config, last.steps, range(last.start, step)):
        return (*kept[:-1], Leg(last.start, config.steps))
    return (*kept, Leg(step, config.steps))


def _have_the_same_rates(config: RunConfig, other_steps: int, steps: range) -> bool:
    """True if a run of `other_steps` steps has the run's learning rates in all of these steps."""
    at = torch.arange(steps.start, steps.stop)
    ours, theirs = (rates(at, hyper_params(replace(config, steps=total))) for total in (config.steps, other_steps))
    return torch.equal(ours, theirs)


def read_legs(home: Path, config: RunConfig) -> tuple[Leg, ...]:
    """Legs of a run folder, from its newest readable checkpoint."""
    for step, path in reversed(steps_in(home / "checkpoints")):
        try:
            settings = read_meta(path).get("settings")
        except UserError:
            continue
        return legs_of(config, settings if isinstance(settings, dict) else {}, step)
    return (Leg(0, config.steps),)


def config_at(config: RunConfig, legs: Sequence[Leg], step: int) -> RunConfig:
    """The settings under which a step, counted from 1, was made."""
    return replace(config, steps=next(leg.steps for leg in reversed(legs) if leg.start < step))


def bends_text(legs: Sequence[Leg]) -> str:
    """The legs in words: 'steps 1 to 300 of a schedule for 600 steps, then of one for 900'."""
    first, *others = legs
    ends = [leg.start for leg in others]
    parts = [f"steps 1 to {ends[0]} of a schedule for {first.steps} steps"] if ends else []
    parts += [
        f"steps {leg.start + 1} to {end} of one for {leg.steps}"
        for leg, end in zip(others, [*ends[1:], others[-1].steps if others else 0], strict=True)
    ]
    return ", ".join(parts)


def reproduction(legs: Sequence[Leg], config_file: str, out: str) -> str:
    """Commands that make a run again, leg by leg; a leg that was stopped before its end says where to stop it."""
    lines = []
    for i, leg in enumerate(legs):
        words = ["tiny-onn", "train", *(["--out", out, "--resume"] if i else ["--config", config_file, "--out", out])]
        words += ["--steps", str(leg.steps)] if len(legs) > 1 else []
        end = legs[i + 1].start if i + 1 < len(legs) else leg.steps
        lines.append(shlex.join(words) + (f"  # stop it after step {end}" if end < leg.steps else ""))
    return "\n".join(lines)
