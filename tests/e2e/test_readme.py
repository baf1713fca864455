"""Every command of the README is run by a test: most of them here, in order, on Multi30k with a shortened training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import environment, settings
from tests.paths import DATA, ROOT, needs_data
from tests.ports import free_port

README = (ROOT / "README.md").read_text()
SHORT = (
    "training.max_steps=12",
    "validation={generation: null}",
    "checkpoint={unit: steps, every: 1, keep_checkpoints: 1, keep_bundles: 10}",
)

RUN_ELSEWHERE = {
    "dstrain pseudo-label --teacher bundles/tiny_average --data data/multi30k --output data/pseudo --beam-size 5": (
        "tests/e2e/test_logits.py"
    ),
    "bash tools/quickstart.sh": "tests/e2e/test_quickstart.py",
    "bash tools/test.sh": ".ci/run",
    "bash tools/get_multi30k.sh data/raw/multi30k": "tests/e2e/test_get_multi30k.py",
    "sbatch --nodes 2 slurm/train.sbatch translation/multi30k_tiny data/multi30k runs/tiny": "tests/slurm/test_training.py",
    "dstrain import fairseq checkpoint_best.pt --dictionary data-bin --output bundles/imported": "tests/unit/cli/test_import.py",
    "dstrain import fairseq-data data-bin --output data/imported": "tests/e2e/test_fairseq.py",
    'dstrain import fairseq-args "$(cat train.sh)" --output recipe.yaml': "tests/e2e/test_fairseq.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_the_readme_is_short_and_its_commands_are_known() -> None:
    assert len(README.splitlines()) <= 200
    assert "@@" not in README
    assert set(RUN_ELSEWHERE) <= set(commands())
    for command, place in RUN_ELSEWHERE.items():
        word = next(word for word in command.split() if word.endswith((".sh", ".sbatch")) or word in {"import", "pseudo-label"})
        assert Path(word).name in (ROOT / place).read_text(), f"{place} does not run {command}"


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@needs_data
@pytest.mark.timeout(900)
def test_the_commands_run_in_order(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=800, check=False)

    (tmp_path / "data" / "raw").mkdir(parents=True)
    for corpus in ("multi30k", "wikitext"):
        (tmp_path / "data" / "raw" / corpus).symlink_to(DATA / corpus)
    script = ["set -euo pipefail"]
    for command in commands():
        if command in RUN_ELSEWHERE:
            continue
        if " train " in command:
            command = f"{command} {' '.join(repr(word) for word in settings(*SHORT))}"
        script.append(command.replace("--num_gpus 2", f"--num_gpus 2 --master_port {free_port()}"))
    assert len(script) > 8
    finished = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "BLEU" in finished.stdout
    assert (tmp_path / "runs" / "tiny" / "report.png").exists()
    assert len((tmp_path / "hyp.de").read_text().splitlines()) == 1000
    for block in blocks("python"):
        ran = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
