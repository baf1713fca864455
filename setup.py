"""Packaging of dstrain. Ranges, not pins: the versions that the test suite runs with stand in tools/constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="dstrain",
    version="0.1.0",
    description="A DeepSpeed trainer for translation and other sequence-to-sequence transformers",
    long_description=open("README.md", encoding="utf-8").read(),  # noqa: SIM115, PTH123
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dstrain", "dstrain.*"]), "dstrain.ds_configs"],
    package_dir={"dstrain.ds_configs": "ds_configs"},
    package_data={"dstrain": ["recipes/*/*.yaml", "py.typed"], "dstrain.ds_configs": ["*.json"]},
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
