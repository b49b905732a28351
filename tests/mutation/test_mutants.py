"""The list of mutants is not stale."""

import ast

import pytest

from tests.mutation.mutants import MUTANTS, TESTS, Mutant
from tests.mutation.run import ROOT, apply, describe


@pytest.mark.parametrize("file", sorted(TESTS))
def test_every_mutant_changes_one_place_and_is_still_python(file: str) -> None:
    source = (ROOT / file).read_text()
    for mutant in (m for m in MUTANTS if m.file == file):
        changed = apply(mutant, source)
        if not file.endswith(".py"):  # whether it compiles shows when it runs
            assert changed != source
        else:
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), describe(mutant)


def test_a_mutant_whose_text_is_gone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'no such text' once, got it 0 times"):
        apply(Mutant("training/step/hooks.py", "no such text", ""), "source")
