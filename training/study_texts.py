"""The texts of a study: what its runs read, and that one that goes on reads what it began with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.continual import texts_of
from training.data.corpus import Splits, fingerprint, open_corpus
from training.data.hf_tokenizer import open_tokenizer
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.run.identity import check_same
from training.storage.atomic import write_text
from training.storage.regular_file import read_small
from training.study_config import StudyConfig
from training.study_plan import Chunk

FILE = Path("checkpoints", "texts.json")  # of a study's folder: group -> task -> fingerprint


def corpora_of(study: StudyConfig, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Splits]:
    """Task -> its text."""
    how: dict[str, Any] = {"holdout": config.holdout, "split": config.split, "tokenizer": tokenizer}
    return {
        task: open_corpus(data, sequence_length=config.sequence_length, progress=True, **how)
        for task, data in texts_of(study, config).items()
    }


def fingerprints(corpora: Mapping[str, Splits]) -> dict[str, str]:
    """Task -> what its text is known by."""
    return {task: fingerprint(corpus) for task, corpus in corpora.items()}


def save_texts(texts: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Write down what the groups of a study begin with."""
    write_text(folder / FILE, json.dumps(texts, indent=1) + "\n")


def began_with(folder: Path, chunk: Chunk) -> dict[str, Any]:
    """What `check_same` compares of a group; nothing in the folder of a version that did not write it down.

    Raises:
        UserError: it is damaged.
    """
    try:
        return {"text": dict(json.loads(read_small(folder / FILE))[chunk.name])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder / FILE}: expected the fingerprints of this study's texts, got others or none; name a new --out"
        ) from None


def check_texts(study: StudyConfig, chunks: Sequence[Chunk], folder: Path) -> None:
    """Refuse to go on with any group where the text of one has changed.

    Raises:
        UserError: it has.
    """
    for chunk in chunks:
        first = chunk.runs[0]
        tokenizer = open_tokenizer("bytes" if first.config.tokenizer == "bytes" else folder / "runs" / first.id)
        now = fingerprints(corpora_of(study, first.config, tokenizer))
        check_same({"text": now}, began_with(folder, chunk), folder)
