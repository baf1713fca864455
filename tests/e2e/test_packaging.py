"""The package as a user gets it: sdist and wheel, installed away from the checkout, and the images of tools/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from dstrain import __version__
from dstrain.recipe_file import recipe_names
from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, environment, events, settings, succeeds
from tests.paths import ROOT

DOCKERFILE = (ROOT / "tools" / "Dockerfile").read_text()
APPTAINER = (ROOT / "tools" / "dstrain.def").read_text()
COPIED = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
"""What the images are built from, and all that the package needs of the checkout."""


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints, away from the checkout: without PYTHONPATH."""
    clean = {name: value for name, value in environment(variables).items() if name != "PYTHONPATH"}
    return succeeds(
        subprocess.run([*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=240, check=False)
    ).stdout


def build(kind: str, tree: Path) -> Path:
    """The file that the build backend makes of a source tree; kind: sdist or wheel."""
    run(sys.executable, "-c", f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')", cwd=tree)
    return max((tree / "dist").iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel of the files that the images copy, and the wheel of their sdist."""
    directory = tmp_path_factory.mktemp("packages")
    tree = directory / "tree"
    for name in COPIED:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    with tarfile.open(build("sdist", tree)) as archive:
        archive.extractall(directory, filter="data")
    return build("wheel", tree), build("wheel", directory / f"dstrain-{__version__}")


def test_the_sdist_makes_the_same_wheel_and_nothing_is_missing(wheels: tuple[Path, Path]) -> None:
    first, second = ({item.filename: item.CRC for item in zipfile.ZipFile(wheel).infolist()} for wheel in wheels)
    assert first == second
    package = {f"dstrain/{path.relative_to(ROOT / 'dstrain')}" for path in (ROOT / "dstrain").rglob("*.py")}
    package |= {f"dstrain/ops/cpu/cpp/{path.name}" for path in (ROOT / "dstrain/ops/cpu/cpp").iterdir()}
    recipes = {f"dstrain/recipes/{name}.yaml" for name in recipe_names()}
    folders = {f"dstrain/{name}/{path.name}" for name in ("ds_configs", "slurm") for path in (ROOT / name).iterdir()}
    other = {name for name in first if ".dist-info/" not in name} ^ (package | recipes | folders | {"dstrain/py.typed"})
    assert not other
    assert wheels[0].name == f"dstrain-{__version__}-py3-none-any.whl"


def test_an_installed_wheel_trains_away_from_the_checkout(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """Only dstrain comes from the wheel; what it depends on is borrowed from the environment of the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    scripts = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheels[0], cwd=tmp_path)
    library = Path(run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (library / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    command = re.findall(r"^cp -r .+$", (ROOT / "slurm" / "README.md").read_text(), re.MULTILINE)[0]
    run("bash", "-c", f'PATH="{scripts}:$PATH"; {command}', cwd=tmp_path)
    assert {path.name for path in (tmp_path / "slurm").iterdir()} == {path.name for path in (ROOT / "slurm").iterdir()}

    dstrain = scripts / "dstrain"
    run(dstrain, "prepare", RECIPE, "--output", "data", "--workers", "1", *settings(*SMALL_DATA), cwd=tmp_path)
    shortened = settings(*SMALL_DATA, *SMALL_TRAINING, "training.max_steps=5", "engine.deepspeed=zero2")
    run(dstrain, "train", RECIPE, "--data", "data", "--output", "run", *shortened, cwd=tmp_path)
    assert [event["step"] for event in events(tmp_path / "run", "train")] == [1, 2, 3, 4, 5]


def commands(text: str) -> list[str]:
    """The steps of an image's shell code, joined by && or one a line, without indentation."""
    return [step.strip() for step in re.split(r"\n|&&", text.replace("\\\n", "")) if step.strip()]


def test_both_images_are_made_alike() -> None:
    section = dict(re.findall(r"^%(\w+)\n((?:    .+\n)+)", APPTAINER, re.MULTILINE))
    assert [line.split() for line in section["files"].splitlines()] == [[name, f"/opt/dstrain/{name}"] for name in COPIED]
    steps = [step for code in re.findall(r"^RUN ((?:.+\\\n)*.+)", DOCKERFILE, re.MULTILINE) for step in commands(code)]
    assert steps == [*commands(section["post"])[3:], *commands(section["test"])]
    assert re.findall(r"^FROM (.+)", DOCKERFILE, re.MULTILINE) == re.findall(r"^From: (.+)", APPTAINER, re.MULTILINE)
    for shell in (section["post"], section["runscript"]):
        succeeds(subprocess.run(["sh", "-n"], input=shell, capture_output=True, text=True, timeout=10, check=False))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is installed with dstrain[test] on Linux, x86_64")
def test_the_dockerfile_passes_its_linter() -> None:
    checked = subprocess.run(
        ["hadolint", str(ROOT / "tools" / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
