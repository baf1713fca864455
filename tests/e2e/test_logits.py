"""The offline half of distillation through the command line.

Logits dumped in three shares, one of them killed, resumed, merged, inspected, learned from; a full disk; a teacher's outputs
trained on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, dstrain, environment, events, fails, settings, succeeds
from tests.processes import Fork, run_verb

WORDS = ("--tokens-per-shard", "60", "--device", "cpu")
SHORT = ("--beam-size", "5", "--length-penalty", "0")
"""A search that prefers outputs which have ended."""


def trained(run: Path, data: Path, steps: int) -> Path:
    """The last bundle of a short training."""
    chosen = settings(*SMALL_DATA, *SMALL_TRAINING, f"training.max_steps={steps}")
    succeeds(dstrain("train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *chosen))
    return run / "bundles" / "last"


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("teacher") / "run", data, steps=3)


@pytest.fixture(scope="module")
def speaker(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learned to end what it says."""
    return trained(tmp_path_factory.mktemp("speaker") / "run", data, steps=30)


@pytest.fixture(scope="module")
def logits(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole, by one process."""
    output = tmp_path_factory.mktemp("logits") / "logits"
    done = succeeds(dstrain("dump-logits", "--teacher", teacher, "--data", data, "--output", output, *WORDS))
    assert "is complete" in done.stdout
    return output


def killed_once(words: Sequence[str | Path], condition: Callable[[], bool], log: Path) -> None:
    """Start a verb and kill it as soon as the condition holds."""
    process = Fork(run_verb, [*map(str, words)], env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_three_shares_one_of_them_killed_make_the_same_bytes(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    output = tmp_path / "logits"
    words = ("dump-logits", "--teacher", teacher, "--data", data, "--output", output, *WORDS)
    killed_once((*words, "--shard", "1/3"), lambda: bool(list(output.glob("*.arrow"))), tmp_path / "log")
    before = len(list(output.glob("*.arrow")))
    succeeds(dstrain(*words, "--shard", "2/3"))
    fails(dstrain("dump-logits", "--merge", output), "is incomplete", "run `dstrain dump-logits` again")
    succeeds(dstrain(*words, "--shard", "0/3"))
    resumed = succeeds(dstrain(*words, "--shard", "1/3"))
    assert f"{before} were finished before" in resumed.stdout or "nothing to do" in resumed.stdout
    merged = succeeds(dstrain("dump-logits", "--merge", output))
    assert "is complete" in merged.stdout
    assert tree(output) == tree(logits)


def test_a_student_trains_on_dumped_logits_as_beside_the_teacher(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    dense, runs = tmp_path / "dense", {name: tmp_path / name for name in ("store", "teacher", "sampled", "two")}
    succeeds(dstrain("dump-logits", "--teacher", teacher, "--data", data, "--output", dense, "--method", "dense", *WORDS))

    def words(run: Path, *teacher_source: str | Path, objective: str = "objective={kind: distillation}") -> list[str | Path]:
        recipe = settings(*SMALL_DATA, *SMALL_TRAINING, "model.dropout=0", objective)
        return ["train", RECIPE, "--data", data, "--output", run, *teacher_source, *recipe]

    def curve(run: Path, *names: str) -> list[float]:
        return [event[name] for event in events(run, "train") for name in names]

    succeeds(dstrain(*words(runs["store"], "--logits", dense)))
    succeeds(dstrain(*words(runs["teacher"], "--teacher", teacher)))
    figures = ("loss", "hard", "kd", "agreement", "grad_norm")
    assert curve(runs["store"], *figures) == pytest.approx(curve(runs["teacher"], *figures), rel=2e-3, abs=1e-6)
    succeeds(dstrain(*words(runs["sampled"], "--logits", logits)))
    assert curve(runs["sampled"], "hard") == pytest.approx(curve(runs["teacher"], "hard"), rel=0.05)
    ranks = Ranks(words(runs["two"], "--logits", logits), 2, tmp_path / "log")
    assert ranks.wait() == [0, 0], ranks.output()
    assert curve(runs["two"], *figures) == pytest.approx(curve(runs["sampled"], *figures), rel=1e-4)

    fails(dstrain(*words(runs["store"], "--logits", logits)), "was started with another teacher")
    fresh = tmp_path / "fresh"
    both = words(fresh, "--logits", logits, "--teacher", teacher)
    fails(dstrain(*both), "--teacher and --logits are two sources of the same signal")
    plain = words(fresh, "--logits", logits, objective="objective={kind: cross_entropy}")
    fails(dstrain(*plain), "objective.kind = cross_entropy has no use for a teacher: leave --logits out")
    reverse = words(fresh, "--logits", logits, objective="objective={kind: distillation, divergence: {kind: reverse_kl}}")
    fails(dstrain(*reverse), "objective.divergence.kind = reverse_kl needs the mass of all tokens", "keeps draws")
    on_policy = words(fresh, "--logits", logits, objective="objective={kind: distillation, on_policy: {}}")
    fails(dstrain(*on_policy), "objective.on_policy needs a teacher of the student's samples", "remove objective.on_policy")
    inside = "objective={kind: distillation, features: [{kind: hidden_states, side: encoder}]}"
    fails(dstrain(*words(fresh, "--logits", logits, objective=inside)), "objective.features learns from inside a teacher, but")
    assert not fresh.exists()


def test_logits_of_another_split_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    valid, run = tmp_path / "valid", tmp_path / "run"
    succeeds(dstrain("dump-logits", "--teacher", teacher, "--data", data, "--output", valid, "--split", "valid", *WORDS))
    recipe = settings(*SMALL_DATA, *SMALL_TRAINING, "objective={kind: distillation}")
    done = dstrain("train", RECIPE, "--data", data, "--output", run, "--logits", valid, *recipe)
    fails(done, "are of the split 'valid', training reads 'train'")
    assert not run.exists()


def test_two_ranks_dump_what_one_process_dumps(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    output = tmp_path / "logits"
    ranks = Ranks(("dump-logits", "--teacher", teacher, "--data", data, "--output", output, *WORDS), 2, tmp_path / "log")
    assert ranks.wait() == [0, 0], ranks.output()
    assert "rank 1: wrote" in ranks.output()
    assert ranks.output().count("is complete") == 1
    assert tree(output) == tree(logits)


def test_ranks_share_the_labeling_and_go_on_after_a_kill(data: Path, speaker: Path, tmp_path: Path) -> None:
    alone, output = tmp_path / "alone", tmp_path / "shared"
    options = (*SHORT, "--max-repeats", "1000", "--device", "cpu", "--pairs-per-shard", "5")
    words = ("pseudo-label", "--teacher", speaker, "--data", data, *options)
    assert "is complete" in succeeds(dstrain(*words, "--output", alone)).stdout
    ranks = Ranks((*words, "--output", output), 2, tmp_path / "log")
    ranks.wait_until(lambda: len(list(output.glob("train/*.arrow"))) > 3)
    ranks.processes[1].kill()
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "another rank has ended before its share was done" in ranks.output()
    assert "Traceback" not in ranks.output()
    before = len(list(output.glob("train/*.arrow")))
    assert not (output / "manifest.json").exists()
    again = Ranks((*words, "--output", output), 2, tmp_path / "again")
    assert again.wait() == [0, 0], again.output()
    assert "finished before" in again.output()
    assert again.output().count("is complete") == 1
    assert before < 48 == len(list(output.glob("train/*.arrow")))
    files = {path.relative_to(alone): path.read_bytes() for path in sorted(alone.rglob("*")) if path.is_file()}
    assert files == {path.relative_to(output): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_inspect_tells_what_it_finds(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    assert "50 draws" in succeeds(dstrain("inspect", logits)).stdout
    assert "prepared data" in succeeds(dstrain("inspect", data)).stdout
    assert "parameters" in succeeds(dstrain("inspect", teacher)).stdout
    fails(dstrain("inspect", tmp_path), "is no prepared data, no bundle and no dumped logits")
    words = ("inspect", logits, "--against-teacher", teacher, "--data", data, "--tokens", "300", "1000")
    lines = succeeds(dstrain(*words)).stdout.splitlines()
    small, large = (float(line.split()[1].rstrip("°")) for line in lines[-2:])
    assert 0 < large < small < 60


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="needs root to mount a full disk")
def test_a_full_disk_loses_no_finished_shard(data: Path, teacher: Path, logits: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        words = ("dump-logits", "--teacher", teacher, "--data", data, "--output", disk / "logits", *WORDS)
        fails(dstrain(*words), "no space left to write", "finished files are kept")
        there = list((disk / "logits").glob("*.arrow"))
        assert there
        for path in there:
            assert path.read_bytes() == (logits / path.name).read_bytes()
        assert not list((disk / "logits").glob("*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_student_trains_on_a_teachers_outputs(data: Path, speaker: Path, tmp_path: Path) -> None:
    labeled, run = tmp_path / "labeled", tmp_path / "run"
    words = ("pseudo-label", "--teacher", speaker, "--data", data, "--output", labeled, *SHORT, "--device", "cpu")
    options = ("--pairs-per-shard", "50", "--max-repeats", "1000", "--keep-original")
    killed_once((*words, *options), (labeled / "train" / "00001.arrow").is_file, tmp_path / "log")
    train = ("train", RECIPE, "--output", run, "--device", "cpu", *settings(*SMALL_DATA, *SMALL_TRAINING))
    fails(dstrain(*train, "--data", labeled), "shards are not done or not merged")
    done = succeeds(dstrain(*words, *options))
    assert "shards were finished before" in done.stdout
    assert "is complete: 480 of 480 pairs" in done.stdout
    trained = succeeds(dstrain(*train, "--data", labeled))
    assert "the training targets are the outputs of teacher" in trained.stderr
    fails(dstrain(*train, "--data", data), "was started on other data")
