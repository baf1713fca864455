"""Puts ds_configs/ and slurm/ into a wheel; everything else about the package stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithFolders(build_py):
    """Copies both folders to dstrain/; a checkout and an editable install read them where they lie."""

    def run(self) -> None:
        """Build as ever, then add the files."""
        super().run()
        if not self.editable_mode:
            for folder in ("ds_configs", "slurm"):
                shutil.copytree(ROOT / folder, Path(self.build_lib) / "dstrain" / folder, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFolders})
