"""Best layout by size of the cluster: memory, step time, communication and cost of a model on many of them.

    python -m benchmarks.scaling.report [--model 0.5B | 30B | small] [--gpus 1 8 64 512 4096] [--json FILE]
    python -m benchmarks.scaling.report --model.num-experts 64 ...   any size of `tiny-onn train`, or --config
    python -m benchmarks.scaling.report --measure                    predictions against 1, 2 and 4 local processes

Every device has `--sequences` of `--length` tokens, so twice the devices are twice the tokens of a step. For each
number of devices the table has the cheapest layout of each kind that fits the memory (else the smallest one, marked).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.models import LARGE
from benchmarks.scaling.plan import Cluster, Plan, layouts_of, plan
from tiny_onn_func import ModelConfig
from tiny_onn_func.params import count_active_params, count_params
from training.errors import UserError
from training.run.config import PLAIN_MODEL

MODELS = {
    "small": PLAIN_MODEL,
    "0.5B": LARGE,
    "30B": ModelConfig(151_936, 2048, 48, 32, 4, 128, 768, 128, num_experts_per_tok=8, tie_word_embeddings=False),
}
GPUS = (1, 8, 64, 512, 4096)
MOST_GPUS = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status: 2 for a mistake, which gets one line."""
    try:
        args, model, cluster = parse(sys.argv[1:] if argv is None else argv)
        if args.measure:
            from benchmarks.scaling.measured import measured

            figures = measured(args.processes)
        else:
            figures = simulated(args, model, cluster)
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (UserError, ValueError) as error:
        print(f"benchmarks.scaling.report: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ModelConfig, Cluster]:
    """(flags, the model, the cluster) of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5B", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help=f"up to {MOST_GPUS}")
    parser.add_argument("--sequences", type=int, default=8, help="of a device in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--measure", action="store_true", help="check against processes of this machine")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="2, 4 or both, beside one")
    for field in fields(Cluster):
        kind = int if field.name == "gpus_per_node" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args, rest = parser.parse_known_args(argv)
    for gpus in args.gpus:
        if not 1 <= gpus <= MOST_GPUS:
            raise UserError(f"--gpus: expected 1 to {MOST_GPUS}, got {gpus}")
    return args, _model(args.model, rest), Cluster(**{f.name: getattr(args, f.name) for f in fields(Cluster)})


def _model(name: str, rest: Sequence[str]) -> ModelConfig:
    if rest:
        from training.run.settings import parse_train_args

        return parse_train_args(list(rest))[0].model
    if name not in MODELS:
        raise UserError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}; or sizes as --model.hidden-size")
    return MODELS[name]


def simulated(args: argparse.Namespace, model: ModelConfig, cluster: Cluster) -> dict[str, Any]:
    """Print the table of a model on a cluster; the figures as plain values."""
    print(headline(model, cluster, args.sequences, args.length) + "\n")
    print(
        "| GPUs | layout | weights, moments, gradients, GiB | activations, surprise, GiB | peak, GiB | step, ms "
        "| communication | tokens/s | $ / 1e9 tokens |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for gpus in args.gpus:
        every = [
            plan(model, cluster, layout, gpus, sequences=args.sequences, length=args.length)
            for layout in layouts_of(model, gpus)
        ]
        for row in best_of_each_kind(every, cluster):
            print(line(row, cluster))
            rows.append(
                row._asdict()
                | {"layout": row.layout.name, "memory": row.memory._asdict()}
                | {"seconds": row.seconds, "dollars": row.dollars(cluster)}
            )
    sizes = {"parameters": count_params(model), "sequences": args.sequences, "length": args.length}
    return {"model": asdict(model), "cluster": asdict(cluster), **sizes, "plans": rows}


def best_of_each_kind(plans: Sequence[Plan], cluster: Cluster) -> Iterator[Plan]:
    """Data, sharded, experts, experts + sharded: of each the cheapest that fits, else the one of the least memory."""
    for spread in (False, True):
        for shard in (False, True):
            kind = [p for p in plans if (p.layout.experts > 1, p.layout.shard_optimizer) == (spread, shard)]
            fitting = [p for p in kind if p.fits]
            if fitting:
                yield min(fitting, key=lambda p: p.dollars(cluster))
            elif kind:
                yield min(kind, key=lambda p: p.memory.peak)


def headline(model: ModelConfig, cluster: Cluster, sequences: int, length: int) -> str:
    """Assumptions of the table, in a sentence or two."""
    active = count_active_params(model, float(model.routes_per_token))
    return (
        f"{count_params(model) / 1e9:.2f} billion parameters, {active / 1e9:.2f} active; {sequences} x {length} tokens "
        f"a device, bfloat16. {cluster.gpus_per_node} devices a machine, {cluster.tflops:g} TFLOP/s at "
        f"{cluster.utilisation:.0%}, {cluster.memory_gib:g} GiB, links of {cluster.intra_gb_s:g} and "
        f"{cluster.inter_gb_s:g} GB/s, {cluster.latency_us:g} us, {cluster.price:g} $/h."
    )


def line(row: Plan, cluster: Cluster) -> str:
    """A plan as a line of the table."""
    weights, moments, gradients, activations, surprise, peak = (part / 2**30 for part in row.memory)
    mark = "" if row.fits else " (too much)"
    return (
        f"| {row.gpus:,} | {row.layout.name} | {weights:.2f}, {moments:.2f}, {gradients:.2f} "
        f"| {activations:.1f}, {surprise:.2f} | {peak:.1f}{mark} | {row.seconds * 1e3:,.0f} "
        f"| {row.communication / row.seconds:.0%} | {row.tokens / row.seconds:,.0f} | {row.dollars(cluster):,.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
