"""What the README says is true: its commands exist, its tree is the tree, its example runs."""

import re
import tomllib

import pytest

from tests.helpers import ROOT
from training.cli import USAGE, main
from training.presets.find import resolve_preset
from training.run.settings import key_types

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    return [line.split("#")[0].split() for line in lines if line.strip().startswith("tiny-onn")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_exists_with_its_flags(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, flags = command[1], [word.split("=")[0] for word in command if word.startswith("--")]
    assert re.search(rf"^  {verb} ", USAGE, re.MULTILINE)
    if verb == "train":
        known = {f"--{key.replace('_', '-')}" for key in key_types()} | {"--config", "--resume"}
        assert set(flags) <= known
        configs = [command[i + 1] for i, word in enumerate(command) if word == "--config"]
        assert all(Path(resolve_preset(config)).is_file() for config in configs)
    else:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        known = capsys.readouterr().out
        assert all(flag in known for flag in flags)


def test_the_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "one run:" in capsys.readouterr().out


def test_the_file_tree_is_the_tree() -> None:
    (tree,) = blocks("text")
    told, folders = set(), []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            told.add("".join(folders))
        assert len(line.split(maxsplit=1)) == 2, f"{name} has no caption"
    there = {
        str(path.relative_to(ROOT))
        for folder in ("tiny_onn_func", "training", "tests", "docs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".md") and path.name != "__init__.py"
    }
    assert there - told == set(), "files that the README does not tell of"
    assert {name for name in told if not (ROOT / name).exists()} == set(), "files that the README only tells of"


def test_every_extra_that_a_message_or_a_page_names_can_be_installed() -> None:
    """And a test that skips for want of a package proves nothing: the README's install line brings the small ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    places = [*(ROOT / "training").rglob("*.py"), *ROOT.glob("docs/*.md")]
    found = [re.findall(r"tiny-onn-func\[(\w+)\]", path.read_text(encoding="utf-8")) for path in places]
    named = {name for names in found for name in names}
    assert "data" in named
    assert named <= extras.keys()
    (installed,) = re.findall(r"pip install -e '\.\[(.*?)\]'", README)
    assert {"dev", "hf", "data"} <= {*installed.split(",")}


def test_no_property_sets_its_own_number_of_examples() -> None:
    """The profiles do: 50 and 1,000, as the README says; a share of them, where an example takes seconds."""
    pinned = re.compile(r"max_examples=\d")
    assert not [path.name for path in (ROOT / "tests").rglob("test_*.py") if pinned.search(path.read_text("utf-8"))]


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
