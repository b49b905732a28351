"""Data sets of the Hugging Face Hub, streamed by the library `datasets`: `hf:OWNER/NAME[:CONFIG][:SPLIT]`.

    source = find_hub("hf:roneneldan/TinyStories:train")

A folder in the Hub's layout, `hf:./folder`, is read in the same way. A row's document is its column `text` or
`messages`. Only the library's own readers of text and tables run: no script of a data set, no pickle, no array.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from training.data.readers import Document, printable
from training.data.rows import COLUMNS, document, learnable
from training.errors import UserError, one_line

PREFIX = "hf:"
BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`; others read pickles, arrays, pictures or agents
NOISY = ("datasets", "huggingface_hub", "httpx", "fsspec", "asyncio")


class Unreachable(UserError):
    """The Hub does not answer."""


class HubRows(NamedTuple):
    """A split of a data set, and a version that changes with its files."""

    builder: Any
    split: str
    name: str
    version: str

    def __iter__(self) -> Iterator[Document]:
        yield from learnable(self.name, self._documents())

    def _documents(self) -> Iterator[Document]:
        with _in_a_line(self.name):
            rows = self.builder.as_streaming_dataset(split=self.split)
            names = rows.column_names or [*next(iter(rows), {})]
            kept = [column for column in COLUMNS if column in names]
            if not kept:
                came = ", ".join(printable(key) for key in names[:8]) or "no column at all"
                raise UserError(
                    f"{self.name}: expected the column `text` or `messages`, got {came}; rename one of them"
                )
            for number, row in enumerate(rows.select_columns(kept), 1):
                filled = {key: value for key, value in row.items() if value is not None} or row
                yield document(filled, f"{self.name}, row {number}")


def find_hub(spec: str) -> HubRows:
    """Look up a data set and its split; no row is read.

    Raises:
        Unreachable: the Hub does not answer.
        UserError: no `datasets`, no such data set, configuration or split, or none of text.
    """
    name, (place, *rest) = printable(spec), spec.removeprefix(PREFIX).split(":")
    if len(rest) > 2 or not (place and (Path(place).is_dir() or "/" in place)):
        raise UserError(f"{name}: expected hf:OWNER/NAME[:CONFIG][:SPLIT] or hf:FOLDER[:SPLIT], got another; mend it")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise UserError(f"{name}: hf: wants the package datasets; pip install tiny-onn-func[data]") from None
    with _in_a_line(name):
        builder = load_dataset_builder(place, config)
        splits = [*(builder.config.data_files or {})]
    if builder.name not in BUILDERS:
        raise UserError(f"{name}: expected a data set of {', '.join(BUILDERS)} files, got {builder.name}; convert it")
    if split not in splits:
        came = ", ".join(printable(str(known)) for known in splits) or "none"
        raise UserError(f"{name}: expected one of its splits, {came}, got {split!r}; choose one: hf:NAME:SPLIT")
    return HubRows(builder, split, name, f"{builder.config_id} {builder.hash} {split}")


@contextmanager
def _in_a_line(name: str) -> Iterator[None]:
    """Errors of the library as one line, without what it logs of them."""
    loggers = [logging.getLogger(noisy) for noisy in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ConnectionError as error:
        raise Unreachable(f"{name}: expected an answer of the Hub, got: {_short(error)}; download it first") from None
    except Exception as error:  # those of datasets, huggingface_hub, pyarrow, pandas and fsspec have no common class
        raise UserError(f"{name}: expected a data set that can be read, got: {_short(error)}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _short(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__
