"""Draw faults by seed: cosmic-ray's of Python, universalmutator's of C."""

import ast
import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = ("tiny_onn_func", "training/step")


class Mutant(NamedTuple):
    """A file with one fault in it."""

    file: str
    line: int
    change: str
    source: str


def draw_python(tree: Path, count: int, seed: int) -> list[Mutant]:
    """Of all that cosmic-ray can do, but to annotations, whose faults end every import, and what is no Python."""
    from cosmic_ray.commands.init import _all_work_items  # its public way is a data base of the same
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found = []
    for path in sorted(path for folder in SOURCES for path in (tree / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        parts = [getattr(n, name, None) for n in ast.walk(ast.parse(text)) for name in ("annotation", "returns")]
        spans = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in parts if n is not None]
        mutations = (item.mutations[0] for item in _all_work_items([path], {}))
        found += [(path, text, m) for m in mutations if not any(a <= m.start_pos < b for a, b in spans)]
    print(f"{len(found):,} mutants of Python", flush=True)
    random.Random(seed).shuffle(found)
    drawn = list[Mutant]()
    while len(drawn) < count and found:
        path, text, mutation = found.pop()
        source = mutate_code(text, get_operator(mutation.operator_name)(), mutation.occurrence)
        with contextlib.suppress(SyntaxError):
            if any(getattr(node, "posonlyargs", ()) for node in ast.walk(ast.parse(source))):
                continue  # the star of a signature is no product
            change = f"{mutation.operator_name.rpartition('/')[2]} {mutation.start_pos} in {mutation.definition_name}"
            drawn.append(Mutant(str(path.relative_to(tree)), mutation.start_pos[0], change, source))
    return drawn


def draw_c(tree: Path, count: int, seed: int) -> list[Mutant]:
    """Of all that universalmutator's rules for C can do to the kernels, if a compiler makes another library of it."""
    found = [mutant for path in sorted((tree / "tiny_onn_func/kernels/csrc").iterdir()) for mutant in c_mutants(path)]
    print(f"{len(found):,} mutants of C", flush=True)
    random.Random(seed).shuffle(found)
    right, drawn = library(tree), list[Mutant]()
    while len(drawn) < count and found:
        mutant = found.pop()
        path = Path(mutant.file)
        text = path.read_text("utf-8")
        path.write_text(mutant.source, "utf-8")
        if library(tree) not in (b"", right):
            drawn.append(mutant._replace(file=str(path.relative_to(tree))))
        path.write_text(text, "utf-8")
    return drawn


def c_mutants(path: Path) -> Iterator[Mutant]:
    """Every change that the rules make to a line of the file; wants `pip install universalmutator`."""
    from universalmutator.mutator import mutants_regexp

    lines = path.read_text("utf-8").splitlines(keepends=True)
    with contextlib.redirect_stdout(io.StringIO()):
        rules = ["universal.rules", "c_like.rules", "c.rules"]
        made = {(number, new) for number, new, *_ in mutants_regexp(lines, ruleFiles=rules, ignorePatterns=[])}
    for number, new in sorted(made):
        change = f"{lines[number - 1].strip()} -> {new.strip()}"
        yield Mutant(str(path), number, change, "".join([*lines[: number - 1], new, *lines[number:]]))


def library(tree: Path) -> bytes:
    """The compiled kernels; nothing if they do not compile."""
    program = "from tiny_onn_func.kernels.build import find_library as find; print(find().read_bytes().hex())"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TINY_ONN_NATIVE_CACHE": folder, "PYTHONPATH": str(tree)}
        ended = subprocess.run([sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True)
    return bytes.fromhex(ended.stdout.decode())


DRAW: dict[str, Callable[[Path, int, int], list[Mutant]]] = {"python": draw_python, "c": draw_c}
