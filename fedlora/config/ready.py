"""The configurations and sweeps that come with the package, by name: ``demo``, ``hub/fpb``."""

from pathlib import Path

from fedlora.errors import InputError

_PLACE = Path(__file__).parents[2] / "experiments"


def names(kind: str = "configs") -> list[str]:
    """The names of the ready configurations, or of the ready sweeps (``sweeps``)."""
    folder = _PLACE / kind
    return sorted(str(f.relative_to(folder).with_suffix("")) for f in folder.rglob("*.toml"))


def locate(path: Path, kind: str = "configs") -> Path:
    """The file at this path, or the ready one of this name.

    Args:
        path: A path, or a name of `names`.
        kind: ``configs`` or ``sweeps``.

    Raises:
        InputError: If a name without a suffix is neither.
    """
    if path.is_file() or path.suffix:
        return path
    if str(path) not in names(kind):
        raise InputError(
            f"cannot read the config {path}: there is no such file, and no ready one has this "
            f"name; give the path of a TOML file, or one of {', '.join(names(kind))}"
        )
    return _PLACE / kind / f"{path}.toml"
