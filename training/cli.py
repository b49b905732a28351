"""The command line: verbs, no logic. One line and exit status 2 for every mistake of the user."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from training.errors import UserError

USAGE = """usage: tiny-onn VERB ...

  train      train a model                  tiny-onn train [--config FILE.yaml] [--data SPEC] [--out DIR] ...
  evaluate   score a run on held-out text   tiny-onn evaluate RUN
  generate   continue a text                tiny-onn generate RUN --prompt "def "

`tiny-onn VERB --help` lists the flags of a verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 well, 2 a mistake of the user, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "evaluate": _evaluate, "generate": _generate}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in verbs:
            raise UserError(f"{arguments[0]}: expected a verb ({', '.join(verbs)}); `tiny-onn --help` explains them")
        verbs[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        return 130
    except (UserError, ValueError) as error:
        print(f"tiny-onn: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"tiny-onn: {error.filename}: {error.strerror}; make room or rights for it, or name another",
            file=sys.stderr,
        )
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")


def _train(argv: Sequence[str]) -> None:
    from training.settings import parse_train_args  # pydantic and tyro, wanted by this verb alone

    config, resume = parse_train_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves a checkpoint, as Ctrl-C does
    from training.engine import train
    from training.tables import summary_table

    summary = train(config, resume=resume)
    print(summary_table(summary, str(config.out)))


def _evaluate(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn evaluate", description="Score a run on its held-out text, beside the baselines.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="score the held-out part of another source")
    parser.add_argument("--bytes", type=int, help="held-out bytes to score; all of them by default")
    arguments = parser.parse_args(argv)
    from training.runs import evaluate_run
    from training.tables import score_table

    score, baselines = evaluate_run(arguments.run, data=arguments.data, max_bytes=arguments.bytes)
    print(score_table(score, baselines))


def _generate(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn generate", description="Continue a text; the same seed gives the same text.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--prompt", default="def ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=400, help="tokens to sample")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the fewest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    from training.runs import stream_run

    pieces = stream_run(
        given.run, given.prompt, tokens=given.tokens, temperature=given.temperature, top_k=given.top_k,
        top_p=given.top_p, seed=given.seed,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
