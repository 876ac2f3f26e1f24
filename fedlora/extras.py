"""Packages that only some uses need, each in an extra of ``pyproject.toml``."""

from importlib import metadata
from importlib.util import find_spec

from fedlora.errors import InputError


def require(package: str, extra: str, purpose: str) -> None:
    """Check that a package is installed, before the work that needs it begins.

    Args:
        package: The name by which Python imports the package.
        extra: The extra of ``pyproject.toml`` that installs the package.
        purpose: The feature that needs the package, as the subject of the error's sentence.

    Raises:
        InputError: If the package is not installed; the message names the remedy.
    """
    if find_spec(package) is None:
        raise InputError(
            f"{purpose} needs the Python package {package}, which is not installed; "
            "run in fedlora's checkout: pip install --constraint constraints.txt "
            f"-e '.[{extra}]'; for containers add {extra} to the build argument EXTRAS"
        )


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
