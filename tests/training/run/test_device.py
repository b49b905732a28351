"""The device and the precision of a run: what auto takes, what is refused, and what a resumed run keeps."""

from pathlib import Path

import pytest
import torch

from training.cli import main
from training.errors import UserError
from training.run import device, program
from training.run.config import RunConfig
from training.run.context import Run
from training.run.device import choose_device, choose_precision, place
from training.run.program import Batches
from training.step.batch import Batch
from training.storage.plain_yaml import read_yaml, write_yaml

SMALL = ("--steps", "2", "--final-eval-bytes", "2048", "--sample-tokens", "0", "--threads", "1", "--eval-every", "0")


class FakeCuda:
    """A machine with CUDA devices, as far as the choice of one looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, has_bfloat16: bool = True) -> None:
        self.current: torch.device | None = None
        first = torch.device("cuda", 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: first)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(self, "current", device))


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def run(tmp_path: Path, no_accelerator: None) -> Path:
    """A finished run of two steps on the CPU."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("a line of text\n" * 900, encoding="utf-8")
    sizes = ("--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-experts", "4")
    assert main(["train", "--data", str(text), "--out", str(out), *SMALL, *sizes]) == 0
    return out


def test_auto_takes_the_accelerator_and_bfloat16_where_it_has_that(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeCuda(monkeypatch, 1)
    config, placement = place(RunConfig())
    assert (placement.device, placement.precision) == (torch.device("cuda:0"), "bfloat16")
    assert config.precision == "bfloat16"
    assert config.device == "auto"  # another machine takes its own
    assert machine.current == placement.device
    assert "accelerator" in placement.device_reason


def test_auto_is_float32_on_a_device_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, 1, has_bfloat16=False)
    assert place(RunConfig())[1].precision == "float32"
    with pytest.raises(UserError, match="precision: expected float32 on cuda:0, which has no bfloat16, got bfloat16"):
        place(RunConfig(precision="bfloat16"))


@pytest.mark.usefixtures("no_accelerator")
def test_auto_is_the_cpu_in_float32_where_there_is_no_accelerator() -> None:
    placement = place(RunConfig())[1]
    assert (placement.device, placement.precision) == (torch.device("cpu"), "float32")


@pytest.mark.parametrize(("rank", "index"), [(0, 0), (3, 1)])
def test_each_process_of_a_machine_takes_its_own_device(rank: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, 2)
    assert choose_device("auto", rank)[0] == choose_device("cuda", rank)[0] == torch.device("cuda", index)
    assert choose_device("cuda:1", rank)[0] == torch.device("cuda", 1)


def test_a_device_behind_the_last_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, 2)
    with pytest.raises(UserError, match="device: expected cuda:0 to cuda:1, got cuda:2"):
        choose_device("cuda:2")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_refused_with_its_key(name: str) -> None:
    with pytest.raises(UserError, match=f"--device: expected auto or cpu, as torch .* got {name}"):
        choose_device(name, key="--device")


def test_the_setting_outweighs_auto() -> None:
    assert choose_precision("float32", torch.device("cpu"))[0] == "float32"
    assert choose_precision("bfloat16", torch.device("cpu"))[0] == "bfloat16"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="device: expected auto, cpu, cuda, cuda:N or mps"):
        RunConfig(device=name)


@pytest.mark.usefixtures("no_accelerator")
def test_train_evaluate_generate_and_study_take_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("a line of text\n" * 900, encoding="utf-8")
    settings = {
        "data": str(text), "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                                     "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 8,
                                     "num_experts": 4, "num_experts_per_tok": 2},
    }  # fmt: skip
    write_yaml(settings, tmp_path / "c.yaml")
    train = ["train", "--config", str(tmp_path / "c.yaml"), "--out", str(out), *SMALL]
    assert main([*train, "--device", "cuda"]) == 2
    assert not out.exists(), "nothing half-written"
    assert main([*train, "--device", "cpu"]) == 0
    saved = read_yaml(str(out / "config.yaml"))
    assert (saved["device"], saved["precision"]) == ("cpu", "float32")
    assert main(["evaluate", str(out), "--device", "cuda"]) == 2
    assert main(["evaluate", str(out), "--device", "cpu", "--bytes", "2000"]) == 0
    assert main(["generate", str(out), "--device", "mps", "--tokens", "3"]) == 2
    assert main(["generate", str(out), "--device", "cpu", "--tokens", "3"]) == 0
    study = tmp_path / "s.yaml"
    arms = [{"name": "a"}, {"name": "b", "set": {"hyper": {"lr": 1e-3}}}]
    write_yaml({"margin": 0.1, "seeds": [1], "arms": arms, "base": settings}, study)
    assert main(["study", str(study), "--out", str(tmp_path / "s"), "--device", "cuda:3"]) == 2
    assert not (tmp_path / "s").exists(), "nothing half-written"
    assert capsys.readouterr().err.count("device: expected") == 4


@pytest.mark.usefixtures("no_accelerator")
def test_a_resumed_run_keeps_the_precision_that_auto_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 900, encoding="utf-8")
    sizes = ("--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-experts", "4")
    assert main(["train", "--data", str(text), "--out", str(out), *SMALL, *sizes]) == 0
    settings = (out / "config.yaml").read_text(encoding="utf-8")
    assert "precision: float32" in settings
    asked: list[str] = []
    monkeypatch.setattr(device, "choose_precision", lambda name, _: (asked.append(name) or name, "as asked"))
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert asked == ["float32"], "not auto, which another device may answer otherwise"
    assert "precision: float32" in (out / "config.yaml").read_text(encoding="utf-8")


def test_on_an_accelerator_the_next_batch_is_drawn_while_a_step_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        program, "step_batch", lambda run, step: drawn.append(step) or Batch(*(torch.tensor(step),) * 3)
    )
    there = Batches(tuple.__new__(Run, (None,) * len(Run._fields))._replace(device=torch.device("cuda", 0)))
    assert there.at(3).labels == 3
    there.prepare(4)
    assert (int(there.at(4).labels), drawn) == (4, [3, 4]), "not drawn again"
    there.prepare(5)
    assert there.at(9).labels == 9, "what was drawn ahead is of another step"
    here = Batches(tuple.__new__(Run, (None,) * len(Run._fields))._replace(device=torch.device("cpu")))
    here.prepare(6)
    assert 6 not in drawn


@pytest.mark.parametrize("name", ["gpu", "cpu:3", "cuda:", ""])
def test_what_is_no_device_is_refused_in_a_line_by_every_verb(name: str) -> None:
    with pytest.raises(UserError, match="--device: expected auto, cpu, cuda, cuda:N or mps, got"):
        choose_device(name, key="--device")


@pytest.mark.usefixtures("no_accelerator")
def test_a_run_is_not_resumed_to_fewer_steps_than_it_has_made(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_bytes()
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--steps", "1"]) == 2
    assert "steps: expected 2 or more, the steps that" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.usefixtures("no_accelerator")
def test_a_score_of_text_that_the_run_may_have_trained_on_is_not_called_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for flags, held_out in (([], True), (["--holdout", "0.1"], True), (["--holdout", "0.4"], False)):
        assert main(["evaluate", str(run), "--bytes", "1000", *flags]) == 0
        shown = capsys.readouterr()
        assert ("held-out bytes" in shown.out) == held_out
        assert ("may be one that it was trained on" in shown.err) != held_out
