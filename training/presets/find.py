"""Resolve the name of a shipped settings file to its path."""

from pathlib import Path

from training.errors import UserError

HOME = Path(__file__).parent
STUDIES = HOME / "studies"


def resolve_preset(name_or_path: str, home: Path = HOME) -> str:
    """Path of a settings file: `name_or_path` itself, or the preset of that name in `home`.

    A file that exists is never taken for a preset, nor is anything with a suffix or a folder in it.

    Raises:
        UserError: a bare name that is neither a file nor a preset; the message lists the presets.
    """
    path = Path(name_or_path)
    if path.exists() or path.suffix or path.name != name_or_path:
        return name_or_path
    names = sorted(preset.stem for preset in home.glob("*.yaml"))
    if name_or_path not in names:
        raise UserError(
            f"{name_or_path}: expected a YAML file or a preset ({', '.join(names)}), got neither; check the name"
        )
    return str(home / f"{name_or_path}.yaml")
