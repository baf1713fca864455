"""slurm/common.sh without Slurm: what it makes of the variables that a job finds."""

import os
import subprocess
from pathlib import Path

import pytest

from dstrain.parallel.launch_environment import master_port
from dstrain.training.preemption import REQUEUE_CODE
from tests.paths import ROOT

SCRIPTS = [path for path in sorted((ROOT / "slurm").iterdir()) if path.suffix in {".sh", ".sbatch"}]

SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames gpu[03-04]" ] && printf 'gpu03\\ngpu04\\n'
"""


def bash(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after slurm/common.sh in a job's environment, with a stand-in for scontrol."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_CPUS_ON_NODE": "96"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DSTRAIN_HOME": str(tmp_path)} | job | variables
    words = ["bash", "-c", f'source "{ROOT}/slurm/common.sh"; {code}']
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("template", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_no_option_stands_after_the_first_command(template: Path) -> None:
    """Slurm ignores such a line silently."""
    lines = template.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(options) < min(commands)


@pytest.mark.parametrize(
    ("code", "variables", "value"),
    [
        ("master_address", {}, "gpu03"),
        ("master_port", {}, str(master_port(123456))),
        ("ranks_per_node", {}, "1"),
        ("ranks_per_node", {"SLURM_GPUS_ON_NODE": "8"}, "8"),
        ("ranks_per_node", {"SLURM_GPUS_ON_NODE": "8", "DSTRAIN_RANKS_PER_NODE": "4"}, "4"),
        ("threads_per_rank", {"SLURM_GPUS_ON_NODE": "8"}, "12"),
        ("threads_per_rank", {"DSTRAIN_RANKS_PER_NODE": "200"}, "1"),
        ("threads_per_rank", {"OMP_NUM_THREADS": "5"}, "5"),
        ("echo $REQUEUE_CODE", {}, str(REQUEUE_CODE)),
        ("DSTRAIN_CONTAINER=x enter_environment; echo $DS_ACCELERATOR", {}, "cpu"),
        ("DSTRAIN_CONTAINER=x enter_environment; echo ${DS_ACCELERATOR-unset}", {"SLURM_GPUS_ON_NODE": "8"}, "unset"),
    ],
)
def test_values_from_the_job(tmp_path: Path, code: str, variables: dict[str, str], value: str) -> None:
    done = bash(code, tmp_path, **variables)
    assert (done.stdout.strip(), done.returncode) == (value, 0)


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    done = bash("enter_environment; echo not reached", tmp_path)
    assert f"no deepspeed in {tmp_path}/.venv: install dstrain there, or set DSTRAIN_VENV" in done.stderr
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 85", 85), ("kill -9 $BASHPID", 137)])
def test_the_exit_code_of_a_step_is_kept(tmp_path: Path, command: str, code: int) -> None:
    done = bash(f"run_step bash -c '{command}' || echo $?", tmp_path)
    assert done.stdout.strip() == (str(code) if code else "")


def test_a_step_that_is_asked_to_stop_is_waited_for(tmp_path: Path) -> None:
    """The signal comes while bash waits; the step's own code must survive that interruption."""
    step = 'trap asked=yes USR1; kill -USR1 $PPID; until [ -n "${asked:-}" ]; do sleep 0.05; done; sleep 0.3; exit 85'
    done = bash(f"run_step bash -c '{step}' || echo $? $stop_requested", tmp_path)
    assert done.stdout.splitlines()[-1] == "85 yes"
    assert "USR1: asking all ranks to save and stop" in done.stdout
