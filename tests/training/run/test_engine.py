"""The loop and the command line on small real text: what a run leaves behind, resuming, writing, and mistakes."""

import json
from pathlib import Path

import pytest

from tests.helpers import assert_same_bits
from training.cli import main
from training.commands.generate import decode_stream
from training.data.baselines import baselines
from training.data.corpus import open_corpus
from training.data.streams import decode, encode
from training.storage.checkpoint import latest_checkpoint, load_checkpoint

TEXT = "the router sends each token to the expert that it surprises least.\n" * 60
SMALL = [
    "--batch-size=2", "--sequence-length=16", "--eval-bytes=100", "--final-eval-bytes=200", "--sample-tokens=8",
    "--model.hidden-size=16", "--model.num-hidden-layers=1", "--model.num-attention-heads=2", "--model.head-dim=8",
    "--model.num-key-value-heads=1", "--model.moe-intermediate-size=8", "--model.num-experts=4",
    "--model.num-experts-per-tok=2", "--hyper.warmup-steps=0",
]  # fmt: skip
SUMMARY = {
    "bits_per_byte", "nats_per_token", "steps", "tokens", "train_seconds", "tokens_per_second", "avg_k", "parameters",
    "active_parameters", "baselines",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


def train(text: Path, out: Path, *flags: str) -> int:
    return main(["train", "--data", str(text), "--out", str(out), *SMALL, *flags])


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(out.parent / "cache"))
        assert train(text, out, "--steps=6", "--eval-every=3", "--checkpoint-every=2") == 0
    return out


def test_a_run_folder_holds_all_that_it_promises(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() >= SUMMARY
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 2 * 16
    assert summary["baselines"].keys() == {"uniform", "unigram", "bigram", "gzip -9", "bzip2 -9", "xz -9e"}
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
    assert records(run)[-1].keys() >= {"tokens", "seconds", "main_loss", "gating_acc", "avg_k", "expert_load"}
    assert "held_out_nats" in records(run)[2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_000003", "step_000004", "step_000006",
    ]  # fmt: skip
    assert any((run / "tensorboard").iterdir())
    for picture in ("core_metrics_latest.png", "expert_dashboard_latest.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_equals_the_uninterrupted_one(run: Path, text: Path, tmp_path: Path) -> None:
    """The cosine ends at `steps`, so the stopped run is the long one, stopped by Ctrl-C."""
    out = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.program.hyper_step", interrupted_after(3))
        assert train(text, out, "--steps=6", "--eval-every=3", "--checkpoint-every=2") == 130
    assert [record["step"] for record in records(out)] == [1, 2, 3]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    whole, resumed = (load_checkpoint(latest_checkpoint(folder)) for folder in (run, out))
    assert_same_bits(resumed, whole)
    changing = {"seconds"}
    for mine, theirs in zip(records(out), records(run), strict=True):
        assert {k: v for k, v in mine.items() if k not in changing} == {
            k: v for k, v in theirs.items() if k not in changing
        }


def interrupted_after(steps: int):
    from training.step.hyper_step import hyper_step

    def stepped(state, *rest, **statics):
        if int(state.step) == steps:
            raise KeyboardInterrupt
        return hyper_step(state, *rest, **statics)

    return stepped


def test_evaluate_repeats_the_score_of_the_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert main(["evaluate", str(run), "--bytes", "200"]) == 0
    printed = capsys.readouterr().out
    assert f"{summary['bits_per_byte']:.3f}" in printed
    assert all(name in printed for name in ("uniform", "unigram", "bigram", "gzip -9", "bzip2 -9", "xz -9e"))


def test_evaluate_parts_another_text_as_it_is_asked_to_or_scores_all_of_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:100], encoding="utf-8")
    assert main(["evaluate", str(run), "--data", str(short)]) == 2
    said = capsys.readouterr().err
    assert "--split tail --holdout 0.2 has enough on each side, or use --all, which scores all of it" in said
    scored = {}
    for flags in (
        ["--all"],
        ["--holdout", "0.4"],
        ["--holdout=0.4", "--split=tail", "--bytes=20"],
        ["--all", "--bytes=9"],
    ):
        assert main(["evaluate", str(run), "--data", str(short), "--json", *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        scored[" ".join(flags)] = result["score"]["bytes"]
        assert (result["baselines"] == {}) == ("--all" in flags)
        assert result["split"] == ("all" if "--all" in flags else "tail")
    assert [*scored.values()] == [99, 39, 20, 9]  # the first byte has nothing before it; a boundary is no byte
    assert main(["evaluate", str(run), "--all"]) == 0
    assert f"on {len(TEXT) - 1:,} held-out bytes" not in (table := capsys.readouterr().out)
    assert f"on {len(TEXT) - 1:,} bytes" in table
    assert main(["evaluate", str(run), "--all", "--split", "tail"]) == 2
    assert "--all: expected no --split" in capsys.readouterr().err


def test_the_same_seed_writes_the_same_text_and_another_one_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "the ", "--tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("the ")
    assert texts[0] == texts[1] != texts[2]


def test_streamed_text_is_the_decoded_text() -> None:
    tokens = [*encode("né 漢字 \U0001f600").tolist(), 256, 0xC3]
    assert "".join(decode_stream(tokens)) == decode(tokens)


def test_the_baselines_rank_as_they_must(text: Path) -> None:
    splits = open_corpus(str(text), sequence_length=16)
    bits = baselines(splits.train, splits.held_out)
    assert bits["uniform"] > bits["unigram"] > bits["bigram"]


MISTAKES = {
    "unknown verb": (["trian"], "trian"),
    "unknown flag": (["train", "--model.hiden-size", "3"], "--model.hiden-size"),
    "wrong type": (["train", "--steps", "many"], "--steps"),
    "size that does not divide": (["train", "--model.num-key-value-heads", "3"], "num-key-value-heads"),
    "budget": (["train", "--hyper.pi-alpha", "1.5"], "--hyper.pi-alpha"),
    "floor above the cap": (
        ["train", "--model.min-experts-per-tok", "5", "--model.max-experts-per-tok", "3"], "min-experts-per-tok",
    ),
    "missing config": (["train", "--config", "none.yaml"], "none.yaml"),
    "missing data": (["train", "--data", "none.txt"], "none.txt"),
    "empty data": (["train", "--data", "empty.txt"], "empty.txt"),
    "short data": (["train", "--data", "short.txt"], "sequence"),
    "below a file": (["train", "--data", "good.txt", "--out", "good.txt/run"], "good.txt: expected a folder, got a"),
    "resume of nothing": (["train", "--data", "good.txt", "--resume"], "--resume"),
    "no run": (["evaluate", "nowhere"], "nowhere"),
    "no number": (["generate", "nowhere", "--tokens", "x"], "--tokens"),
    "unknown option": (["generate", "nowhere", "--speed", "9"], "--speed"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it_and_leaves_nothing_behind(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty.txt", ""), ("short.txt", "tiny"), ("good.txt", TEXT)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    arguments, named = MISTAKES[mistake]
    new = ["--out", "new"] if arguments[0] == "train" and "--out" not in arguments else []
    assert main([*arguments, *new]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert train(text, run, "--steps=2") == 2
    assert "--resume" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_empty_prompt_is_the_beginning_of_a_document_and_the_default_of_a_text(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for prompt in (["--prompt", ""], []):
        assert main(["generate", str(run), *prompt, "--tokens", "9", "--no-stop"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert 0 < len(texts[0].rstrip("\n")) <= 9 * len("<|endoftext|>")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["sample"]
    assert not summary["sample"].startswith("<|endoftext|>")


def test_several_samples_are_numbered_and_the_first_is_the_single_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(run), "--prompt", "the ", "--tokens", "12", "--no-stop"]
    assert main(command) == 0
    single = capsys.readouterr().out.rstrip("\n")
    assert main([*command, "--num-samples", "3"]) == 0
    parts = capsys.readouterr().out.split("\n\n---")
    assert parts[0] == f"--- 1 of 3 ---\n{single}"
    assert [part.splitlines()[0] for part in parts[1:]] == [" 2 of 3 ---", " 3 of 3 ---"]
    assert len({part.partition("---\n")[2] for part in parts}) == 3
    assert main([*command, "--num-samples", "0"]) == 2
    assert "--num-samples: expected 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        ("generate", ("--temperature TEMPERATURE", "(default: 0.8)", "(default: 400)", "--num-samples")),
        ("evaluate", ("--split {auto,document,tail}", "--holdout", "--all", "--json")),
        ("tokenizer", ("(default: stdlib)", "(default: 0.1)")),
    ],
)
def test_help_says_the_defaults(verb: str, lines: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in lines)
    assert "default: None" not in said
    assert "default: False" not in said


def test_a_run_on_chats_continues_a_users_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it is a router."}]
    path, out = tmp_path / "chats.jsonl", tmp_path / "run"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 40, encoding="utf-8")
    assert main(["train", "--data", str(path), "--out", str(out), "--split=tail", "--steps=2", *SMALL]) == 0
    turn = "<|user|>\nHello!<|end|>\n<|assistant|>\n"
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["sample"].startswith(turn)
    capsys.readouterr()
    assert main(["generate", str(out), "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith(turn)
    assert main(["generate", str(out), "--tokens", "3", "--prompt", "def "]) == 0
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)
def test_memory_that_is_not_there_is_one_line(
    error: Exception, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("training.commands.evaluate.evaluate_run", fails)
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tiny-onn: memory: expected enough for what was asked, got: ")
    assert said.count("\n") == 1
    monkeypatch.setattr("training.commands.evaluate.evaluate_run", lambda *_, **__: next(iter(())))
    with pytest.raises(StopIteration):  # what nobody foresaw is not dressed up
        main(["evaluate", str(run)])


def test_a_run_in_parts_is_the_run_but_for_rounding_and_may_go_on_whole(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parts in (1, 2):
        assert train(text, tmp_path / str(parts), "--steps=4", f"--accumulate={parts}", "--eval-every=0") == 0
    whole, in_parts = (records(tmp_path / name) for name in ("1", "2"))
    for mine, theirs in zip(in_parts, whole, strict=True):
        for key in ("main_loss", "router_loss", "grad_norm", "router_grad_norm", "surprise"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert main(["train", "--out", str(tmp_path / "2"), "--resume", "--steps=5", "--accumulate=1"]) == 0
    capsys.readouterr()
    assert train(text, tmp_path / "3", "--accumulate=3") == 2
    assert capsys.readouterr().err == (
        "tiny-onn: --accumulate: expected a divisor of batch_size (2), got 3; change one of them\n"
    )
