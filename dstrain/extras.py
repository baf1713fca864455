"""Packages that only one verb or one sink needs: `pip install "dstrain[EXTRA]"`. They are imported where they are used."""

from importlib import import_module
from typing import Any

from dstrain.errors import ExtraError


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """The module `module` of a package that the extra `extra` installs. Raises ExtraError, naming `purpose` and the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ExtraError(
            f'{purpose} needs a package that cannot be imported ({error}); pip install "dstrain[{extra}]"'
        ) from error
