"""Packaging of dstrain. Ranges, not pins: the versions that the test suite runs with stand in tools/constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INIT = (ROOT / "dstrain" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'__version__ = "(.+)"', INIT)[0]


class BuildWithDeepSpeedFiles(build_py):
    """Puts ds_configs/ into a wheel as dstrain/ds_configs/; a checkout and an editable install read it where it lies."""

    def run(self) -> None:
        """Build as ever, then add the files."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "ds_configs", Path(self.build_lib) / "dstrain" / "ds_configs", dirs_exist_ok=True)


setup(
    name="dstrain",
    version=VERSION,
    description="A DeepSpeed trainer for translation and other sequence-to-sequence transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["dstrain", "dstrain.*"]),
    package_data={"dstrain": ["recipes/*/*.yaml", "py.typed"]},
    cmdclass={"build_py": BuildWithDeepSpeedFiles},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8",
        "sentencepiece>=0.2.0",
        "pyarrow>=15",
        "pydantic>=2.7",
        "safetensors>=0.4.3",
        "sacrebleu>=2.4",
        "numpy>=1.26",
        "pyyaml>=6",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "wandb>=0.17",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "transformers>=4.50",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "types-tqdm",
            "types-setuptools",
        ]
    },
    entry_points={"console_scripts": ["dstrain = dstrain.__main__:script"]},
)
