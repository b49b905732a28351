"""What the README and the pages of docs/ say is true: commands, paths and names exist, the example runs."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT, script
from training.cli import USAGE, main
from training.presets.find import STUDIES, resolve_preset
from training.run.config import KEYS
from training.run.settings import SWITCHES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = README


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text: str) -> list[str]:
    """The commands of a page's shell blocks, comments left away, continued lines joined."""
    joined = (block.replace("\\\n", " ") for block in blocks("bash", text))
    parts = (part for block in joined for line in block.splitlines() for part in line.split("&&"))
    return [part.split("#")[0].strip() for part in parts]


def commands() -> list[tuple[str, list[str]]]:
    return [(page, line.split()) for page, text in sorted(PAGES.items()) for line in lines(text) if "$" not in line]


OURS = [(page, words) for page, words in commands() if words[:1] == ["tiny-onn"]]


def test_there_are_commands_to_check() -> None:
    assert len([page for page, _ in OURS if page == "README.md"]) >= 5
    assert len({page for page, _ in OURS}) >= 5


@pytest.mark.parametrize(("page", "command"), OURS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_every_command_exists_with_its_flags(page: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, flags = command[1], [word.split("=")[0] for word in command if word.startswith("--")]
    assert re.search(rf"^  {verb} ", USAGE, re.MULTILINE)
    if verb == "train":
        known = {f"--{key.replace('_', '-')}" for key in KEYS} | {"--config", *SWITCHES}
        assert set(flags) <= known
        configs = [command[i + 1] for i, word in enumerate(command) if word == "--config"]
        assert all(Path(resolve_preset(config)).is_file() for config in configs)
        return
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = capsys.readouterr().out
    assert all(flag in known for flag in flags)
    if verb == "study" and command[2] != "FILE.yaml" and not command[2].startswith("--"):
        assert Path(resolve_preset(command[2], STUDIES)).is_file()


def test_every_verb_has_its_line() -> None:
    """And every line a verb: by its own name, or by an alias that it names."""
    rows = [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (`\w+`[^|]*) \|", README, re.MULTILINE)]
    verbs = set(re.findall(r"^  (\w+)  ", USAGE, re.MULTILINE))
    assert len(verbs) == len(rows) >= 10
    assert all(verbs & set(names) for names in rows)
    assert verbs <= {name for names in rows for name in names}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_rooms_of_the_readme_are_there() -> None:
    (tree,) = blocks("text")
    rooms: set[str] = set()
    room = ""
    for line in tree.splitlines():
        name, about = line.split(maxsplit=1)
        room = "" if not line.startswith(" ") else room
        rooms.add(room + name)
        room = name if not line.startswith(" ") else room
        assert about
    packages = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in ROOT.glob("t*/*/__init__.py")}
    missing = {name for name in packages - rooms if not name.startswith("tests/")}
    assert missing == set(), "rooms that the README does not name"
    assert {name for name in rooms if not (ROOT / name).is_dir()} == set(), "rooms that the README only names"


def test_the_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "one run:" in capsys.readouterr().out


def test_every_extra_that_a_message_or_a_page_names_can_be_installed() -> None:
    """And a test that skips for want of a package proves nothing: the README's install line brings the small ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    places = [*(ROOT / "training").rglob("*.py"), *ROOT.glob("docs/*.md")]
    mentions = [re.findall(r"tiny-onn-func\[(\w+)\]", path.read_text(encoding="utf-8")) for path in places]
    named = {name for names in mentions for name in names}
    assert "data" in named
    assert named <= extras.keys()
    (installed,) = re.findall(r"pip install -e '\.\[(.*?)\]'", README)
    assert {"dev", "hf", "data"} <= {*installed.split(",")}


def test_no_property_sets_its_own_number_of_examples() -> None:
    """The profiles do: 50 and 1,000, as the README says; a share of them, where an example takes seconds."""
    pinned = re.compile(r"max_examples=\d")
    assert not [path.name for path in (ROOT / "tests").rglob("test_*.py") if pinned.search(path.read_text("utf-8"))]


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    linked = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    assert sum(link.endswith(".png") for _, link in linked) >= 2
    assert [(page, link) for page, link in linked if not (ROOT / page).parent.joinpath(link).exists()] == []
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}  # the site's front page
    assert pages <= {link for _, link in linked}


def test_the_layout_page_is_fresh() -> None:
    layout = script("docs/make_layout.py")
    text = PAGES["docs/layout.md"]
    assert layout.page(text) == text, "stale: run `python docs/make_layout.py`"
    assert re.findall(r"^\| \[(\S+)\]\(\S+\) \|  \|$", text, re.MULTILINE) == [], "files without a caption"


def test_what_the_layout_page_says_where_it_is_is_there() -> None:
    table = PAGES["docs/layout.md"].split("## Every file")[0]
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \|$", table, re.MULTILINE)
    assert len(rows) >= 15
    mentions = [(file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert [(file, name) for file, name in mentions if name not in (ROOT / file).read_text(encoding="utf-8")] == []


def test_the_rule_of_the_contributing_page_works_as_it_stands() -> None:
    rule, *_ = blocks("python", PAGES["docs/contributing.md"])
    assert "Rule(init, update)" in rule
    exec(compile(rule, "contributing.md", "exec"), {})


MADE = {"training/commands/count.py", "config.yaml", "study.yaml"}  # by the steps of a page, or by a run
ROOMS = "tiny_onn_func|training|tests|benchmarks|docs"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_module_and_path_of_a_page_is_there(page: str) -> None:
    text = PAGES[page]
    asked = {name.rstrip(".") for name in re.findall(r"python -m ([\w.]+)", text)}
    assert {name for name in asked if importlib.util.find_spec(name) is None} == set(), "python -m"
    paths = {path.rstrip(".") for path in re.findall(rf"(?<![\w/.])((?:{ROOMS})/[\w/.-]*)", text)}
    assert {path for path in paths - MADE if not (ROOT / path).exists()} == set(), "paths"
    names = set(re.findall(r"`([a-z_0-9]+\.(?:py|c|h|yaml))`", text)) - MADE
    assert {name for name in names if not any(_here(name))} == set(), "file names"
    dotted = set(re.findall(r"`((?:tiny_onn_func|training)(?:\.\w+)+)`", text))
    assert {name for name in dotted if not _is_python(name)} == set(), "modules"
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in tests if not any(_here(f"{name}.py"))} == set(), "tests"


def _here(name: str) -> list[Path]:
    return [path for room in ROOMS.split("|") for path in (ROOT / room).rglob(name)]


def _is_python(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parent, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return hasattr(importlib.import_module(parent), last)
