"""The scripts and notebooks of examples/ run, say what they promise, and stay short."""

import hashlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers import ROOT, example
from training.cli import main
from training.storage.plain_yaml import write_yaml

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NUMBER = r"[-+]?\d+\.?\d*"


def output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    example(name).main()
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_at_most_sixty_lines_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"\npython examples/{name}.py\n" in text


def test_there_is_a_script_for_each_thing_of_ones_own() -> None:
    rules = {"second_least_surprised", "average_surprise_of_a_token"}  # tests/training/step/test_own_rules.py
    assert {*SCRIPTS} == rules | {"own_loop", "own_hook_point", "vmapped_budgets", "meta_gradient"}


def test_the_own_loop_learns_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = output("own_loop", capsys)
    losses = numbers(rf"loss ({NUMBER})", text)
    assert losses[-1] < losses[0]
    (held_out,), (untrained,) = numbers(rf"held out: ({NUMBER})", text), numbers(rf"({NUMBER}) untrained", text)
    assert held_out < untrained - 2


def test_the_own_hook_point_measures_the_surprise_without_the_hidden_activation() -> None:
    """Slope times ||h|| is the surprise: of one row both are known."""
    module = example("own_hook_point")
    from tiny_onn_func import ModelConfig, forward, init_params
    from tiny_onn_func.experts import apply_w2
    from tiny_onn_func.tree import tree_map
    from training import Batch, HyperParams, per_token_surprise
    from training.step.surprise import scatter_rows

    config = ModelConfig(20, 8, 2, 2, 1, 4, 6, 4, num_experts_per_tok=2)
    params = tree_map(lambda leaf: leaf.requires_grad_(), init_params(config, torch.Generator().manual_seed(0)))
    ids = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(1))
    slopes, sizes = torch.full((2, 10, 4), torch.inf), torch.full((2, 10, 4), torch.inf)

    def both(layer: int, hidden: torch.Tensor, w2: torch.Tensor, rows: object) -> torch.Tensor:
        sizes[layer] = scatter_rows(hidden.detach().norm(dim=-1), rows.token, rows.expert, 10, 4)
        return recorded(layer, hidden, w2, rows)

    recorded = module.recording(slopes)
    logits, _ = forward(params, ids, config, apply_w2=both)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    plain = tree_map(torch.Tensor.detach, params)
    wanted = per_token_surprise(plain, Batch(ids, ids, torch.ones_like(ids)), config, HyperParams())
    assert torch.equal(slopes.isfinite(), wanted.isfinite())
    torch.testing.assert_close((slopes * sizes)[wanted.isfinite()], wanted[wanted.isfinite()], rtol=1e-4, atol=1e-8)
    assert apply_w2 is not recorded


def test_the_own_hook_point_prints_a_share_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    shares = numbers(rf"layer \d: ({NUMBER}) of", output("own_hook_point", capsys))
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


def test_a_larger_budget_visits_more_experts(capsys: pytest.CaptureFixture[str]) -> None:
    experts = numbers(rf"({NUMBER}) experts a token", output("vmapped_budgets", capsys))
    assert experts == sorted(experts)
    assert experts[-1] > 2 * experts[0] > 2


def test_the_gradient_through_a_step_raises_a_rate_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    text = output("meta_gradient", capsys)
    assert all(slope < 0 for slope in numbers(rf"slope ({NUMBER})", text))
    rates = numbers(rf"next rate ({NUMBER})", text)
    assert rates == sorted(rates)
    assert rates[-1] > 1e-3


def test_the_gradient_through_a_step_is_the_quotient_of_differences() -> None:
    """Of the loss after a step, in double precision."""
    from torch.func import grad

    from tests.helpers import tiny_batch, tiny_config
    from tiny_onn_func.tree import tree_map
    from training import HyperParams, hyper_step, init_state

    config = tiny_config(num_experts_per_tok=2)
    state = init_state(config, torch.Generator().manual_seed(0))
    state = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state)
    batch = tiny_batch(config)

    def loss_after(log_lr: torch.Tensor) -> torch.Tensor:
        after, _ = hyper_step(state, batch, HyperParams(lr=log_lr.exp(), router_coupling=1.0), config)
        return hyper_step(after, batch, HyperParams(router_coupling=1.0), config)[1].main_loss

    at, by = torch.tensor(1e-3, dtype=torch.float64).log(), 1e-4
    quotient = (loss_after(at + by) - loss_after(at - by)) / (2 * by)
    torch.testing.assert_close(grad(loss_after)(at), quotient, rtol=1e-3, atol=1e-9)


# Notebooks ------------------------------------------------------------------------------------------------------------


def notebook(name: str) -> ModuleType:
    pytest.importorskip("marimo")
    path = ROOT / "examples" / "notebooks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marimo's own modules
def test_the_notebook_of_a_study_shows_its_runs_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    base = {"data": str(tmp_path / "text.txt"), "steps": 3, "batch_size": 2, "sequence_length": 16, "eval_every": 0}
    base |= {"final_eval_bytes": 60, "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_experts": 4}}
    plan = {
        "question": "Is it read?", "margin": 0.02, "falsifier": "It is not.", "baseline": "plain", "seeds": [0, 1],
        "base": base, "arms": [{"name": "plain"}, {"name": "quick", "set": {"hyper.lr": 0.01}}],
    }  # fmt: skip
    write_yaml(plan, tmp_path / "study.yaml")
    assert main(["-q", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "study")]) == 0
    before = digests(tmp_path / "study")
    _, defs = notebook("read_study").app.run(defs={"folder": str(tmp_path / "study")})
    assert digests(tmp_path / "study") == before
    assert [*defs["histories"]] == ["plain-seed0", "plain-seed1", "quick-seed0", "quick-seed1"]
    assert len(defs["axes"].lines) == 4
    assert all(len(line.get_xdata()) == 3 for line in defs["axes"].lines)
    assert len(defs["results"]) == 4
    assert "plain-seed0" in defs["summary"].text or "plain" in defs["summary"].text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marimo's own modules
def test_the_notebook_of_the_functional_api_follows_its_numbers() -> None:
    app = notebook("functional_api").app
    _, small = app.run(defs={"num_experts": 4, "lr": 1e-2})
    assert small["losses"][-1] < small["losses"][0]
    assert small["surprise"].shape == (2, 128, 4)
    assert small["visits"].sum(dim=1).tolist() == [256, 256]  # each token visits two experts
    _, frozen = app.run(defs={"num_experts": 4, "lr": 0.0})
    gained, alone = (of["losses"][0] - of["losses"][-1] for of in (small, frozen))
    assert abs(alone) < 0.05 < gained  # the router alone learns at a rate of its own
