"""Banner at the start of a run: versions, data, device, threads, sizes, and where the run writes."""

from typing import NamedTuple

import torch

from tiny_onn_func.kernels import build
from tiny_onn_func.kernels.runtime import threads
from tiny_onn_func.params import count_active_flops, count_active_params, count_params
from training.run.context import Run
from training.run.device import Placement
from training.storage.checkpoint_files import version


class BannerFacts(NamedTuple):
    """Facts that the banner prints."""

    version: str
    torch_version: str
    data: str  # as `data` names it
    train_bytes: int
    held_out_bytes: int
    tokenizer: str
    vocab_size: int
    device: str  # as `device_text` makes it
    processes: int
    threads: int
    kernels: bool  # whether the C kernels are compiled
    parameters: int
    active_parameters: int
    active_flops: float  # of a token's forward pass
    at_most: bool  # whether the last two are bounds, as K is chosen token by token
    steps: int
    first_step: int  # steps made before
    batch_size: int
    sequence_length: int
    parts: int  # of a batch, one after another
    out: str


def device_text(placement: Placement) -> str:
    """Device and precision, and why."""
    device, precision, device_reason, precision_reason = placement
    return f"{device} ({device_reason}), {precision} ({precision_reason})"


def facts_of(run: Run, placement: Placement) -> BannerFacts:
    """The facts of a run before its first step."""
    config, model, corpus = run.config, run.config.model, run.corpus
    experts = float(model.routes_per_token)
    return BannerFacts(
        version=version(),
        torch_version=torch.__version__,
        data=config.data,
        train_bytes=corpus.train.num_bytes,
        held_out_bytes=corpus.held_out.num_bytes,
        tokenizer=config.tokenizer,
        vocab_size=corpus.train.tokenizer.vocab_size,
        device=device_text(placement),
        processes=run.team.world.size,
        threads=threads(),
        kernels=build.library() is not None,
        parameters=count_params(model),
        active_parameters=round(count_active_params(model, experts)),
        active_flops=count_active_flops(model, experts, config.sequence_length),
        at_most=model.num_experts_per_tok != experts,
        steps=config.steps,
        first_step=run.first_step,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        parts=config.accumulate,
        out=str(run.folder),
    )


def banner(facts: BannerFacts) -> str:
    """The facts as aligned lines."""
    bound = "at most " if facts.at_most else ""
    kernels = "C kernels compiled" if facts.kernels else "no C kernels: PyTorch's operations, several times slower"
    processes = f"{facts.processes} processes of " if facts.processes > 1 else ""
    parts = f" in {facts.parts} parts" if facts.parts > 1 else ""
    begun = f" from step {facts.first_step:,} on" if facts.first_step else ""
    lines = {
        "data": f"{facts.data}: {facts.train_bytes:,} bytes to train on, {facts.held_out_bytes:,} held out",
        "tokenizer": f"{facts.tokenizer}, {facts.vocab_size:,} tokens",
        "device": facts.device,
        "threads": f"{processes}{facts.threads}; {kernels}",
        "parameters": f"{facts.parameters:,}, {bound}{facts.active_parameters:,} active in a token",
        "FLOPs": f"{bound}{_in_units(facts.active_flops)} a token forward, about three times that in a training step",
        "steps": f"{facts.steps:,} of {facts.batch_size:,} x {facts.sequence_length:,} tokens{parts}{begun}",
        "run folder": facts.out,
    }
    rows = (f"{name:<10}  {text}" for name, text in lines.items())
    return "\n".join((f"tiny-onn {facts.version}, torch {facts.torch_version}", *rows))


def _in_units(number: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
