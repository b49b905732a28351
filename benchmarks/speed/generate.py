"""Speed of generation: `generate` against `transformers`' `generate` on the same exported model, both greedy.

    python -m benchmarks.speed.generate [--batches 1 16] [--prompt N] [--new N] [--rounds N] [--threads N] [--json FILE]

A model with the sizes of the default preset and random weights; `save_pretrained` writes it, `from_pretrained` reads.
Both write the same tokens, which is checked first. Figures are of whole calls: prompt, cache, every token.
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Timing, interleaved, machine, ratio
from tiny_onn_func import ModelConfig, generate, init_params, save_pretrained
from training.run.config import DEFAULT_MODEL
from training.run.process import disable_heap_trimming

OURS, PEER = "tiny_onn_func.inference.generate", "transformers generate"
Subjects = dict[str, Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="texts at once")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    disable_heap_trimming()
    torch.set_num_threads(args.threads)
    host = machine()
    print(host, flush=True)
    params, peer = both_models(DEFAULT_MODEL)
    results = {}
    for batch in args.batches:
        subjects = writers(params, peer, DEFAULT_MODEL, batch, args.prompt, args.new)
        texts = [subject() for subject in subjects.values()]
        assert torch.equal(*texts), f"batch {batch}: expected the same greedy text of both, got two"
        assert texts[0].shape[1] == args.prompt + args.new, "both write until the end"
        results[batch] = interleaved(subjects, args.rounds, warm_up=0)
        print(speed_table(results[batch], batch, args.new), flush=True)
    if args.json:
        timings = {f"batch {batch}": {name: t._asdict() for name, t in r.items()} for batch, r in results.items()}
        figures = {"machine": host, "prompt": args.prompt, "new": args.new, "milliseconds": timings}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def both_models(config: ModelConfig) -> tuple[Any, Any]:
    """Random parameters that look at what they read, and the same ones in `transformers`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    params = init_params(config, torch.Generator().manual_seed(0))
    params["embed_tokens"] *= 10  # a fresh model repeats its last token
    params["layers"]["moe"]["router"] *= 20  # and routes almost evenly
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        folder = Path(place, "model")
        save_pretrained(params, config, folder)
        return params, AutoModelForCausalLM.from_pretrained(folder).eval()


def writers(params: Any, peer: Any, config: ModelConfig, batch: int, prompt: int, new: int) -> Subjects:
    """Subjects to time: the same prompts, greedy, until `new` tokens are there."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(config.vocab_size - 1, (batch, prompt), generator=generator)
    mask = torch.ones_like(ids)

    def theirs() -> Tensor:
        return peer.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    return {OURS: lambda: generate(params, ids, config, generator, max_new_tokens=new, temperature=0.0), PEER: theirs}


def speed_table(timings: dict[str, Timing], batch: int, new: int) -> str:
    """Tokens a second of both, and how many times faster we were, round by round."""
    lines = [f"**batch {batch}**", "", "| what | tokens/s | quartiles |", "|---|---|---|"]
    for name, timing in timings.items():
        speed = [batch * new / ms * 1e3 for ms in (timing.median, timing.high, timing.low)]
        lines.append("| {} | {:.0f} | {:.0f} to {:.0f} |".format(name, *speed))
    rounds = [theirs / ours for ours, theirs in zip(timings[OURS].rounds, timings[PEER].rounds, strict=True)]
    lines.append(f"\ntimes faster, round by round: {', '.join(f'{times:.2f}' for times in rounds)}")
    lines.append(f"median {statistics.median(rounds):.2f}, quartiles {_span(timings)}\n")
    return "\n".join(lines)


def _span(timings: dict[str, Timing]) -> str:
    _, low, high = ratio(timings, PEER, OURS)
    return f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
