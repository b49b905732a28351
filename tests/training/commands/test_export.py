"""Model cards, and pushing to a Hub that is a fake: no network, no token in any line."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from training.cli import main
from training.commands.export import CARD, export_run
from training.commands.model_card import model_card
from training.errors import UserError
from training.run.finished import open_run

SECRET = "hf_" + "SECRETsecret0123456789"
FLAGS = [
    "--config=small_qwen3",
    "--steps=2", "--batch-size=2", "--sequence-length=16", "--eval-every=0", "--final-eval-bytes=60",
    "--sample-tokens=0",
    "--model.hidden-size=16", "--model.num-hidden-layers=1", "--model.num-attention-heads=2",
    "--model.num-key-value-heads=1", "--model.head-dim=8", "--model.moe-intermediate-size=8", "--model.num-experts=4",
    "--model.num-experts-per-tok=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("the quick brown fox " * 50)
    data = f"--data={folder}/a.txt:3,{folder}/b.txt:1"
    assert main(["-q", "train", data, f"--out={folder / 'run'}", *FLAGS]) == 0
    return folder / "run"


class FakeHub:
    """Stands for `huggingface_hub.HfApi`; notes what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repo_id: str, **how: Any) -> str:
        """Note it, or fail."""
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **how}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **how: Any) -> None:
        """Note it, with the names of the files."""
        files = sorted(path.name for path in Path(how.pop("folder_path")).iterdir())
        self.calls.append(("upload_folder", {**how, "files": files}))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return FakeHub


# Card -----------------------------------------------------------------------------------------------------------------


def test_an_export_has_a_card_with_data_size_score_rule_and_limits(run: Path, tmp_path: Path) -> None:
    text = (export_run(run, tmp_path / "out") / CARD).read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    assert YAML(typ="safe", pure=True).load(header)["library_name"] == "transformers"
    assert [line[3:] for line in body.splitlines() if line.startswith("## ")] == [
        "Data", "Size", "Score", "Router rule", "Use", "Limits",
    ]  # fmt: skip
    config, params, _ = open_run(run)
    size = sum(leaf.numel() for name, leaf in _leaves(params) if not name.endswith("router_bias"))
    for wanted in (
        r"| trained on | a.txt \(75%\), b.txt \(25%\) |", "| tokens seen | 64 |",
        "| experts | 4 a layer, 2 for a token |",
        "bigram", "60 held\\-out bytes after 2 steps", "| surprise | w2 |", r"| hyper.balance\_weight | 1.0 |",
        "| context in training | 16 |",
    ):  # fmt: skip
        assert wanted in body, body
    assert f"{size:,}" in body or f"{sum(leaf.numel() for _, leaf in _leaves(params)):,}" in body
    assert str(run.parent) not in text  # where the files lie on this machine
    assert model_card(run, config, config.model) == text


def _leaves(params: Any) -> list[tuple[str, Any]]:
    from tiny_onn_func.tree import flatten

    return [*flatten(params).items()]


def test_a_card_of_a_run_without_a_summary_says_that_there_is_no_score(run: Path, tmp_path: Path) -> None:
    config = open_run(run).config
    assert "None: the run has no summary of its end." in model_card(tmp_path, config, config.model)


def test_what_a_run_brings_cannot_change_the_card(run: Path, tmp_path: Path) -> None:
    """Names of folders and files, and values of a summary, are text."""
    config = open_run(run).config
    folder = tmp_path / "x<script>`[a](b)\n# head"
    folder.mkdir()
    (folder / "summary.json").write_text(
        '{"bits_per_byte": 1, "steps": "<b>|", "held_out_bytes": [], "tokens": "|",'
        ' "baselines": {"<i>`|": 2, "n": "x"}}'
    )
    text = model_card(folder, config, config.model)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "\n# head" not in text
    assert "[a](b)" not in text
    for content in ("[]", "{", '{"bits_per_byte": "x", "baselines": 3}'):
        (folder / "summary.json").write_text(content)
        assert "no summary of its end" in model_card(folder, config, config.model)


def test_an_export_with_another_k_says_that_the_score_is_not_its_own(run: Path, tmp_path: Path) -> None:
    text = (export_run(run, tmp_path / "out", num_experts_per_tok=3) / CARD).read_text(encoding="utf-8")
    assert "Scored at K = 2; this folder has K = 3" in text
    assert "experts | 4 a layer, 3 for a token" in text


def test_an_export_with_its_card_can_be_replaced(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    export_run(run, tmp_path / "out", force=True)
    assert (tmp_path / "out" / CARD).is_file()


# Push -----------------------------------------------------------------------------------------------------------------


def test_a_push_uploads_the_folder_and_prints_its_address(
    run: Path, tmp_path: Path, fake: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--push", "me/model"]) == 0
    (made, how), (sent, what) = fake.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert how == {"repo_id": "me/model", "repo_type": "model", "exist_ok": True}
    assert what["repo_id"] == "me/model"
    assert what["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {CARD, "config.json", "model.safetensors", "tokenizer.json"} <= {*what["files"]}
    out, err = capsys.readouterr()
    assert "pushed: https://huggingface.co/me/model" in err
    assert out.strip() == str(tmp_path / "out")
    assert SECRET not in out + err


def test_without_push_nothing_is_sent(run: Path, tmp_path: Path, fake: type[FakeHub]) -> None:
    assert main(["-q", "export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert fake.calls == []


@pytest.mark.parametrize("verbose", [[], ["-v"]])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route\nto host"), OSError(f"401: Authorization: Bearer {SECRET}"), ValueError(f"{SECRET}"),
        RuntimeError("of another user: hf_" + "AnotherTokenOfSomebody"),
    ],
    ids=["offline", "refused", "value", "other"],
)  # fmt: skip
def test_a_hub_that_refuses_is_one_line_without_a_token(
    error: Exception, verbose: list[str], run: Path, tmp_path: Path, fake: type[FakeHub],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(FakeHub, "error", error)
    assert main([*verbose, "export", str(run), "--out", str(tmp_path / "out"), "--push", "me/model"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("tiny-onn: --push me/model: expected the Hub to take the folder, got: ")
    assert "hf upload me/model" in last
    assert verbose or err.count("\n") == 1
    assert SECRET not in out + err
    assert "AnotherToken" not in out + err
    assert (tmp_path / "out" / CARD).is_file()  # the export is there for another try


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "me/..", "me/mo del", "x" * 99, "https://huggingface.co/me/model"])
def test_a_name_that_no_repository_has_is_refused_before_anything_is_written(
    name: str, run: Path, tmp_path: Path, fake: type[FakeHub]
) -> None:
    with pytest.raises(UserError, match="--push: expected OWNER/NAME, got"):
        export_run(run, tmp_path / "out", push=name)
    assert [*tmp_path.iterdir()] == []


def test_without_huggingface_hub_one_line_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install tiny-onn-func\[hf\]"):
        export_run(run, tmp_path / "out", push="me/model")
