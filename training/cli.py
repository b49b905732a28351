"""The command line: verbs, no logic. One line and exit status 2 for every mistake of the user."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NoReturn

from training.errors import UserError, flag, is_out_of_memory, one_line
from training.suggest import advice, suggestion
from training.terminal import LOG, set_verbosity

USAGE = """usage: tiny-onn VERB ...

  train      train a model                  tiny-onn train [--config FILE.yaml] [--data SPEC] [--out DIR] ...
  evaluate   score a run on held-out text   tiny-onn evaluate RUN
  generate   continue a text                tiny-onn generate RUN --prompt "def "
  export     a run for Hugging Face         tiny-onn export RUN --out DIR
  tokenizer  learn one from a text          tiny-onn tokenizer train --data SPEC --vocab-size 4096 --out DIR
  surgery    a dense Qwen3 into experts     tiny-onn surgery QWEN3_DIR --out DIR --num-experts 32
  study      compare many runs              tiny-onn study FILE.yaml [--out DIR] [--quick] [--resume]
  rerun      make one step again            tiny-onn rerun RUN --step N
  doctor     is all well here?              tiny-onn doctor [RUN]
  report     a web page of what was found   tiny-onn report DIR
  watch      the same, while it goes on     tiny-onn watch DIR [--port N]

`tiny-onn VERB --help` lists the flags of a verb. Every verb takes -q, --quiet (errors and the result alone) and -v,
--verbose (details and tracebacks); `tiny-onn --version` prints the version, `tiny-onn --print-completion bash` or `zsh`
a script by which a shell completes verbs and flags."""
QUICK = "--quick shows that the study works; its runs are too short and too few for its results to decide anything"
DEVICES = "auto (an accelerator where there is one), cpu, cuda, cuda:N or mps"
OLDEST_TORCH = (2, 11)  # as in pyproject.toml
ALIASES = {"replay": "rerun"}  # former names of verbs
IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY)
DESCRIBED = ("\0",)  # arguments that no shell can pass: a verb then describes its flags
SWITCHES = ("-q", "--quiet", "-v", "--verbose")  # which may also stand in front of the verb


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 well, 1 the doctor found something, 2 a mistake, 130 Ctrl-C, 141 no reader."""
    set_verbosity()
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    finally:
        set_verbosity()  # -q and -v are of one command


def _main(arguments: list[str]) -> int:
    verbs: dict[str, Callable[[Sequence[str]], int | None]] = {
        "train": _train,
        "evaluate": _evaluate,
        "generate": _generate,
        "export": _export,
        "tokenizer": _tokenizer,
        "surgery": _surgery,
        "study": _study,
        "rerun": _rerun,
        "doctor": _doctor,
        "report": _report,
        "watch": _watch,
    }
    try:
        before = _leading_switches(arguments)
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if arguments else 2
        if arguments[0] == "--version":
            from training.storage.checkpoint_files import version

            print(f"tiny-onn {version()}")
            return 0
        check_versions()
        if arguments[0] == "--print-completion":
            from training.commands.completion import print_completion

            parsers = {verb: _parser_of(function) for verb, function in verbs.items() if verb != "train"}
            print_completion("".join(arguments[1:]), parsers)
            return 0
        verb = ALIASES.get(arguments[0], arguments[0])
        if verb not in verbs:
            meant = suggestion(verb, verbs)
            mend = f"did you mean {meant}?" if meant else "`tiny-onn --help` explains them"
            raise UserError(f"{verb}: expected a verb ({', '.join(verbs)}); {mend}")
        with _ended_by_ctrl_c():
            import torch  # noqa: F401  seconds of C++, which an exception would abort
        return verbs[verb]([*before, *arguments[1:]]) or 0
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("tiny_onn_func", "training"):
            raise
        _log_error(f"{package}: expected this package, found none; pip install 'tiny-onn-func[lab]'")
        return 2
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, ValueError) as error:
        if str(error):  # else another process says it
            _log_error(error)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = error or "too little"
        _log_error(
            f"memory: expected enough for what was asked, got: {cause}; choose smaller sizes, batches or lengths"
        )
        return 2
    except OSError as error:
        name = error.filename if error.filename2 is None else error.filename2  # of a renaming: not its draft
        place = "" if name is None else f"{name}: "
        mend = "move it away" if error.errno in IN_THE_WAY else "make room or rights for it"
        _log_error(f"{place}{error.strerror or error}; {mend}, or name another")
        return 2


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """End the process at once, with status 130, when SIGINT comes: nothing is begun that an exception should undo."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leading_switches(arguments: list[str]) -> list[str]:
    """Take -q and -v away from in front of the verb."""
    switches = []
    while arguments and arguments[0] in SWITCHES:
        switches.append(arguments.pop(0))
    return switches


def _log_error(error: object) -> None:
    """Log an error as one line, with --verbose where it comes from, too."""
    LOG.debug("where the error comes from:", exc_info=True)
    LOG.error("tiny-onn: %s", one_line(error))


def check_versions() -> None:
    """Refuse a torch older than the oldest that the tests passed with.

    Raises:
        UserError: it is.
    """
    there = metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", there)[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"torch: expected {wanted} or newer, got {there}; pip install -U 'torch>={wanted}'")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str) -> None:
        super().__init__(  # without abbreviations: --n would pass for --no-stop
            prog, description=description, allow_abbrev=False, formatter_class=_Formatter
        )
        self.add_argument("-q", "--quiet", action="store_true", help="print errors and the result alone")
        self.add_argument("-v", "--verbose", action="store_true", help="print details and tracebacks, too")

    def parsed(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; the log follows -q and -v."""
        if argv == DESCRIBED:
            raise _DescribedError(self)
        args = self.parse_args(argv)
        set_verbosity(quiet=args.quiet, verbose=args.verbose)
        return args

    def error(self, message: str) -> NoReturn:
        mend = f"; `{self.prog} --help` lists the flags"
        if unknown := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            known = [name.removeprefix("--").replace("-", "_") for name in self._option_string_actions]
            mend = advice(unknown[1].replace("-", "_"), known, mend, flag)
        raise UserError(f"{message}{mend}")


class _DescribedError(Exception):
    """Carries the parser of a verb that was asked for it."""


def _parser_of(verb: Callable[[Sequence[str]], int | None]) -> _Parser:
    try:
        verb(DESCRIBED)
    except _DescribedError as described:
        return described.args[0]
    raise AssertionError("every verb but train parses its arguments first")


def _train(argv: Sequence[str]) -> None:
    from training.run.launch import open_team
    from training.run.settings import parse_train_args

    with open_team(lambda: parse_train_args(argv)) as (team, config, resume):
        from training.run.engine import train
        from training.run.process import stop_politely
        from training.run.summary import summary_table

        stop_politely()
        summary = train(config, resume=resume, team=team)
        if team.first:
            print(summary_table(summary, str(config.out)))


def _evaluate(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn evaluate", description="Score a run on its held-out text, beside the baselines.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", metavar="SPEC", help="score another source; the run's own data by default")
    parser.add_argument("--split", choices=("auto", "document", "tail"), help="what is held out; as in the run")
    parser.add_argument("--holdout", type=float, metavar="SHARE", help="share that is held out; as in the run")
    parser.add_argument("--all", action="store_true", help="score all of the text, held out or not; no baselines then")
    parser.add_argument("--bytes", type=int, metavar="N", help="bytes to score; all of them by default")
    parser.add_argument("--json", action="store_true", help="print the score as one JSON object")
    parser.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    args = parser.parsed(argv)
    from training.commands.evaluate import evaluate_run
    from training.run.summary import score_table

    evaluation = evaluate_run(
        args.run, data=args.data, max_bytes=args.bytes, split=args.split, holdout=args.holdout,
        everything=args.all, device=args.device,
    )  # fmt: skip
    if args.json:
        print(json.dumps({**evaluation._asdict(), "score": evaluation.score._asdict()}))
    else:
        print(score_table(evaluation.score, evaluation.baselines, "held-out bytes" if evaluation.held_out else "bytes"))


def _generate(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn generate", description="Continue a text; the same seed gives the same text.")
    parser.add_argument("run", help="run folder, or a Qwen3-MoE folder of Hugging Face")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="text to continue; the run's own `prompt`, else a new document"
    )
    parser.add_argument("--tokens", type=int, default=400, metavar="N", help="tokens to sample")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the fewest tokens of this probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 repeats less")
    parser.add_argument("--context", type=int, metavar="N", help="last tokens it sees; as in training, 0 for all")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a token that ends the text, too")
    parser.add_argument("--no-stop", action="store_true", help="write on where a document or a turn ends")
    parser.add_argument("--show-experts", action="store_true", help="then list the experts that every token visited")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    args = parser.parsed(argv)
    from training.commands.generate import stream_run

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    pieces = stream_run(
        args.run, args.prompt, tokens=args.tokens, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, repetition_penalty=args.repetition_penalty, context=args.context, stops=args.stop,
        go_on=args.no_stop, show_experts=args.show_experts, width=width, seed=args.seed,
        num_samples=args.num_samples, device=args.device,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _export(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn export", description="Write a run as a Qwen3-MoE folder for Hugging Face's tools.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", required=True, help="new or empty folder")
    parser.add_argument("--num-experts-per-tok", type=int, metavar="K", help="experts a token visits; the run's own")
    parser.add_argument("--from-sharded", action="store_true", help="the newest sharded checkpoint")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, too")
    args = parser.parsed(argv)
    from training.commands.export import export_run

    if args.from_sharded:
        from training.distributed.sharded_checkpoint import gather_sharded

        gather_sharded(args.run)
    print(
        export_run(
            args.run, args.out, num_experts_per_tok=args.num_experts_per_tok, force=args.force, push=args.push
        )
    )  # fmt: skip


def _tokenizer(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn tokenizer", description="Learn byte pairs (BPE) from the part that a run trains on.")
    parser.add_argument("action", choices=("train",), help="learn a tokenizer")
    parser.add_argument("--data", default="stdlib", help="what a run would take: stdlib, a file, a folder, a glob")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, 256 bytes among them")
    parser.add_argument("--out", required=True, help="new or empty folder")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the text that is left out, as in a run")
    parser.add_argument("--split", choices=("auto", "document", "tail"), default="auto", help="as in a run")
    args = parser.parsed(argv)
    from training.data.train_tokenizer import train_tokenizer

    print(train_tokenizer(args.data, args.out, args.vocab_size, holdout=args.holdout, split=args.split))


def _surgery(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn surgery", description="Cut every MLP of a dense Qwen3 folder into experts.")
    parser.add_argument("model", help="folder with config.json and safetensors")
    parser.add_argument("--out", required=True, help="new or empty folder")
    parser.add_argument("--num-experts", type=int, required=True, metavar="E", help="a divisor of intermediate_size")
    parser.add_argument("--num-experts-per-tok", type=int, metavar="K", help="all of them by default; -1 is dynamic")
    parser.add_argument("--split", choices=("contiguous", "clusters"), default="contiguous")
    parser.add_argument("--calibration", metavar="FILE", help="text whose activations --split clusters looks at")
    parser.add_argument("--force", action="store_true", help="replace an earlier result in --out")
    args = parser.parsed(argv)
    from training.commands.surgery import cut_into_experts

    out = cut_into_experts(
        args.model, args.out, num_experts=args.num_experts, num_experts_per_tok=args.num_experts_per_tok,
        split=args.split, calibration=args.calibration, force=args.force,
    )  # fmt: skip
    print(out)


def _study(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn study", description="Make every run of a study, and compare its arms.")
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE.yaml",
        help="the study, or the name of a preset such as routers; with --resume the folder's own",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the study; by default runs/<name of the file>")
    parser.add_argument("--quick", action="store_true", help="the short version that the file's `quick` describes")
    parser.add_argument("--resume", action="store_true", help="go on with the study in --out")
    parser.add_argument("--runs-at-once", type=int, metavar="N", help="runs of one program; automatic by default")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="where its groups are trained")
    parser.add_argument("--device", metavar="D", help=f"{DEVICES}; the file's `base.device` by default")
    parser.add_argument("--address", help="for ray: HOST:PORT of a cluster, or auto; without, one of its own")
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of FILE.yaml, for editors")
    args = parser.parsed(argv)
    if args.print_schema:
        from training.study.schema import study_schema

        print(json.dumps(study_schema(), indent=1))
        return
    if args.address and args.launcher != "ray":
        raise UserError("--address: expected --launcher ray with it, got --launcher local; add it, or leave --address")
    from training.study.file import load_study, named_study, on_device

    file, out = named_study(args.file, args.out, quick=args.quick, resume=args.resume)
    study = on_device(load_study(file, quick=args.quick), args.device)
    from training.run.process import stop_politely
    from training.study.launch import local_launcher
    from training.study.ray.launcher import ray_launcher
    from training.study.runner import run_study

    stop_politely()
    if args.quick:
        LOG.info("note: %s", QUICK)
    launcher = ray_launcher(args.address) if args.launcher == "ray" else local_launcher
    results = run_study(study, out, resume=args.resume, runs_at_once=args.runs_at_once, launcher=launcher)
    note = f"\n{QUICK}\n" if args.quick else ""
    print(f"{results.table}\n{note}\nstudy folder: {results.folder}\nreport: {results.folder / 'report.html'}")


def _rerun(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn rerun", description="Make one step of a run again, and look at all its numbers.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="number of the step, from 1 on")
    args = parser.parsed(argv)
    from training.commands.rerun import rerun, rerun_table

    print(rerun_table(rerun(args.run, args.step)))


def _doctor(argv: Sequence[str]) -> int:
    parser = _Parser("tiny-onn doctor", description="Versions, machine, and the soundness of a run or study folder.")
    parser.add_argument("run", nargs="?", help="folder of a run or a study")
    args = parser.parsed(argv)
    from training.commands.doctor import doctor

    return 0 if doctor(args.run) else 1


def _report(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn report", description="Write report.html into the folder of a study or of a run.")
    parser.add_argument("folder", metavar="DIR", help="what `tiny-onn study` or `tiny-onn train` made")
    args = parser.parsed(argv)
    from training.study.report import write_report

    report = write_report(args.folder)
    print(f"{report.text}\n\nreport: {report.path}")


def _watch(argv: Sequence[str]) -> None:
    parser = _Parser("tiny-onn watch", description="Serve the report of a run or study that goes on; Ctrl-C ends it.")
    parser.add_argument("folder", metavar="DIR", help="what `tiny-onn study` or `tiny-onn train` makes")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1; any free one by default")
    args = parser.parsed(argv)
    from training.commands.watch import open_server
    from training.study.report import FolderReader

    reader = FolderReader(args.folder)
    with open_server(lambda: reader.read()[0], args.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows {args.folder}; Ctrl-C ends it", flush=True)
        server.serve_forever()
