"""Resolve the name of a shipped settings file to its path."""

from pathlib import Path

from training.errors import UserError

HOME = Path(__file__).parent
STUDIES = HOME / "studies"


def resolve_preset(given: str, home: Path = HOME) -> str:
    """The path of a settings file: `given` itself, or the preset of that name in `home`.

    A file that exists is never taken for a preset, nor is anything with a suffix or a folder in it.

    Raises:
        UserError: a bare name that is neither a file nor a preset; the message lists the presets.
    """
    path = Path(given)
    if path.exists() or path.suffix or path.name != given:
        return given
    names = sorted(preset.stem for preset in home.glob("*.yaml"))
    if given not in names:
        raise UserError(f"{given}: expected a YAML file or a preset ({', '.join(names)}), got neither; check the name")
    return str(home / f"{given}.yaml")
