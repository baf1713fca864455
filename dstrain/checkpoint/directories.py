"""Which directory is a bundle or a checkpoint, told by its names alone: nothing is read, and torch is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.errors import BundleError, CheckpointError
from dstrain.storage.atomic import complete_version, previous_version
from dstrain.storage.directory_kind import directory_kind, instead_of
from dstrain.storage.outputs import check_output

MODEL, WEIGHTS, TOKENIZER, RECIPE = "model.yaml", "model.safetensors", "tokenizer", "recipe.yaml"
ADAPTER, ADAPTER_YAML, ADAPTER_WEIGHTS = "adapter", "adapter.yaml", "adapter.safetensors"
MANIFEST_NAME = "manifest.json"
"""Of a checkpoint."""
STEP_NAME = re.compile(r"step_\d{8,}")


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, plain or with an adapter, also while a training replaces it."""
    return any(_describes_model(path) for path in (directory, previous_version(directory), directory))


def is_adapter(directory: Path) -> bool:
    """Whether a directory is an adapter bundle."""
    return (directory / ADAPTER / ADAPTER_YAML).exists()


def _describes_model(directory: Path) -> bool:
    return (directory / MODEL).exists() or is_adapter(directory)


def require_bundle(directory: Path, base: Path | None = None) -> None:
    """BundleError unless `is_bundle`. base: one that the bundle rests on, and a bundle too, if it is named."""
    if not is_bundle(directory):
        raise BundleError(f"{directory} is not a bundle: it has no {MODEL}; {instead_of('a bundle', directory)}")
    if base is not None:
        require_adapter(directory, base)
        require_bundle(base)


def require_adapter(directory: Path, base: Path) -> None:
    """BundleError unless a bundle rests on a base, so that `base` may be named."""
    if not is_adapter(complete_version(directory)):
        raise BundleError(f"--base {base}: {directory} is no adapter bundle, so it rests on no other; leave --base out")


def require_different(directories: Sequence[Path]) -> None:
    """BundleError if a bundle is named twice, through a link too."""
    seen: dict[Path, Path] = {}
    for directory in directories:
        if (first := seen.setdefault(directory.resolve(), directory)) is not directory:
            raise BundleError(f"{directory} is the same bundle as {first} and would count twice; name it once")


def check_bundle_output(directory: Path, inputs: Mapping[str, Path | None], *, overwrite: bool) -> None:
    """`check_output` for a bundle, which replaces nothing but a bundle: BundleError for anything else."""
    if directory.is_file() or (directory.is_dir() and not _describes_model(directory) and any(directory.iterdir())):
        raise BundleError(f"{directory} exists and is not a bundle, so it is not replaced; choose another --output")
    check_output(directory, inputs, overwrite=overwrite)


def require_checkpoint(directory: Path) -> None:
    """CheckpointError unless the directory has the manifest of a checkpoint."""
    if directory_kind(directory) != "a checkpoint":
        raise CheckpointError(f"{directory} is no checkpoint: {instead_of('a checkpoint', directory)}")


def step_bundles(directory: Path) -> list[Path]:
    """The bundles of RUN/bundles that are named after their step, oldest first."""
    return sorted(
        (path for path in directory.glob("step_*") if STEP_NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name.removeprefix("step_")),
    )


def newest_step_bundles(run: Path, count: int | None) -> list[Path]:
    """The newest of a run, or all of them, oldest first. BundleError if it is no run or has fewer."""
    if not (run / "bundles").is_dir():
        missing = f"{run} is neither a run (it has no bundles/) nor a bundle (it has no {MODEL})"
        raise BundleError(f"{missing}: {instead_of('a run', run)}")
    present = step_bundles(run / "bundles")
    if not present:
        raise BundleError(f"{run}/bundles holds no step_... bundle yet: wait for the first checkpoint, or name bundles instead")
    if count is not None and len(present) < count:
        raise BundleError(
            f"{run}/bundles holds {len(present)} step_... bundles, not {count}: lower --last to {len(present)}, "
            "or train on with a larger checkpoint.keep_bundles"
        )
    return present[-count:] if count else present
