"""Where `export` and `surgery` write: a new or empty folder, or an earlier result of theirs that may be replaced."""

from pathlib import Path

from tiny_onn_func.huggingface.folder import check_target
from training.data.readers import printable
from training.errors import UserError


def check_out(out: str | Path, *, force: bool) -> None:
    """Refuse a folder that holds something; with `force` only what is not an earlier result.

    Raises:
        UserError: it holds an earlier result.
        ValueError: it holds something else.
    """
    target = check_target(out)
    if not force and target.is_dir() and any(target.iterdir()):
        raise UserError(
            f"--out: expected a new or empty folder, got {printable(target)}, which holds a model that was written "
            "before; add --force to replace it, or name another"
        )
