"""The one kind of error that a user can cause."""

LONGEST = 2000  # characters of a message


class UserError(ValueError):
    """A mistake in a setting, a file or a command: one line that names it, what was wanted, what came, how to mend."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


def flag(key: str) -> str:
    """Spell a setting as the command line does: hyper.warmup_steps is --hyper.warmup-steps."""
    return "--" + key.replace("_", "-")


def one_line(message: object) -> str:
    """A message as a terminal may show it: line ends are spaces, control characters of a file are spelled, not sent."""
    text = " ".join(str(message).split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out, which PyTorch reports as a RuntimeError."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in message or "out of memory" in message
