"""The one kind of error that a user can cause."""


class UserError(ValueError):
    """A mistake in a setting, a file or a command: one line that names it, what was wanted, what came, how to mend."""
