"""One sentence's whole way through the command line: prepare, train under a launcher, generate, evaluate, average, report."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from tests.e2e.support import (
    RECIPE,
    SMALL_DATA,
    SMALL_TRAINING,
    curve,
    dstrain,
    environment,
    events,
    fails,
    settings,
    succeeds,
)
from tests.ports import free_port


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run trained by two processes under the deepspeed launcher."""
    directory = tmp_path_factory.mktemp("run") / "run"
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "dstrain"]
    overrides = (*SMALL_DATA, *SMALL_TRAINING, TENSORBOARD, SHORT_TRANSLATIONS)
    words = ["train", RECIPE, "--data", data, "--output", directory, *settings(*overrides)]
    finished = subprocess.run(
        [*launcher, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return directory


SHORT_TRANSLATIONS = "validation.generation={kind: beam, beam_size: 2, max_length_ratio: 0, max_length_offset: 4}"
TENSORBOARD = "reporting={log_every: 1, tensorboard: true, wandb: {project: tests, mode: offline}}"


def test_training_writes_what_the_readme_lists(run: Path) -> None:
    assert {"recipe.yaml", "events.jsonl", "checkpoints", "bundles"} <= {path.name for path in run.iterdir()}
    assert (run / "checkpoints" / "latest").exists()
    assert {"best", "last"} <= {path.name for path in (run / "bundles").iterdir()}
    assert events(run, "start")[0]["world_size"] == 2
    assert events(run, "end")[0]["reason"]
    assert list((run / "tensorboard").iterdir())
    assert list((run / "wandb").iterdir())


def test_the_same_recipe_gives_the_same_curve_under_torchrun_and_in_one_process(run: Path, data: Path, tmp_path: Path) -> None:
    """Dropout masks differ between world sizes, so one process is compared without dropout elsewhere; here: the same ranks."""
    other = tmp_path / "other"
    words = ["train", RECIPE, "--data", data, "--output", other, *settings(*SMALL_DATA, *SMALL_TRAINING)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dstrain"]
    finished = subprocess.run(
        [*launcher, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr.count("  memory    about ") == 1  # of two ranks one says it
    assert curve(other) == curve(run)


def test_text_generate_evaluate(run: Path, data: Path, tmp_path: Path) -> None:
    succeeds(dstrain("text", data, "--split", "test", "--output", tmp_path))
    source, target, hypothesis = (tmp_path / name for name in ("source.txt", "target.txt", "hypothesis.txt"))
    succeeds(dstrain("generate", run / "bundles" / "last", "--input", source, "--output", hypothesis, "--beam-size", "3"))
    lines = hypothesis.read_text().splitlines()
    assert len(lines) == 20
    scored = succeeds(dstrain("evaluate", "--hypothesis", hypothesis, "--reference", target))
    bleu = sacrebleu.corpus_bleu(lines, [target.read_text().splitlines()])
    assert f"{bleu.score:.2f}" in scored.stdout
    assert "nrefs:1|case:mixed" in scored.stdout


def test_interactive_answers_every_line(run: Path) -> None:
    answered = succeeds(dstrain("interactive", run / "bundles" / "last", stdin="The girl sleeps.\n\nA dog waits.\n"))
    lines = answered.stdout.split("\n")
    assert len(lines) == 4
    assert lines[1] == ""


def test_average_and_validate(run: Path, data: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "average"
    succeeds(dstrain("average", run, "--last", "3", "--output", bundle))
    scored = succeeds(dstrain("validate", bundle, "--data", data, "--beam-size", "1"))
    scores = json.loads(scored.stdout)
    assert 0 < scores["loss"] < 20
    assert {"perplexity", "bleu", "chrf"} <= set(scores)
    fails(dstrain("average", run, "--last", "30", "--output", tmp_path / "none"), "30")


def test_validate_equals_the_last_validation_of_training(run: Path, data: Path) -> None:
    best = events(run, "valid")[-1]["best_step"]
    scores = json.loads(succeeds(dstrain("validate", run / "bundles" / "best", "--data", data)).stdout)
    expected = next(event for event in events(run, "valid") if event["step"] == best)
    names = ("loss", "perplexity", "bleu", "chrf", "repetition")
    assert [scores[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-6)
    assert scores["chrf"] > 0


def test_report_draws_curves(run: Path, tmp_path: Path) -> None:
    succeeds(dstrain("report", run, "--output", tmp_path))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "grad" in page


def test_a_run_resumed_with_another_recipe_is_refused_with_the_difference(run: Path, data: Path) -> None:
    words = ["train", RECIPE, "--data", data, "--output", run, *settings(*SMALL_DATA, *SMALL_TRAINING, TENSORBOARD)]
    fails(dstrain(*words, *settings("optimizer.learning_rate=0.5")), "optimizer.learning_rate: 0.003 -> 0.5")


def test_a_change_that_is_accepted_acts_from_the_resume_on_and_is_in_the_events(run: Path, data: Path, tmp_path: Path) -> None:
    """As the message about it says."""
    again = Path(shutil.copytree(run, tmp_path / "run"))
    words = ["train", RECIPE, "--data", data, "--output", again, *settings(*SMALL_DATA, *SMALL_TRAINING, TENSORBOARD)]
    words += settings("training.max_steps=16", "optimizer.learning_rate=0.0003")
    said = fails(dstrain(*words), "optimizer.learning_rate: 0.003 -> 0.0003")
    option = re.search(r"accept them with (--accept-changes) (\S+), or", said)
    assert option is not None
    succeeds(dstrain(*words, *option.groups()))
    assert "optimizer.learning_rate: 0.003 -> 0.0003, accepted" in events(again, "resume")[-1]["changes"]
    rates = {event["step"]: event["learning_rate"] for event in events(again, "train")}
    assert rates[15] == pytest.approx(rates[14] / 10, rel=0.05)  # the schedule itself falls a little from step to step
    succeeds(dstrain(*words, *option.groups()))  # the same command goes on


def test_a_finished_run_started_again_ends_at_once(run: Path, data: Path) -> None:
    before = curve(run)
    words = ["train", RECIPE, "--data", data, "--output", run, *settings(*SMALL_DATA, *SMALL_TRAINING, TENSORBOARD)]
    # Two processes trained it; one process reads their checkpoint, says so and finds nothing left to do.
    done = dstrain(*words)
    assert done.returncode == 0, done.stderr
    assert "2 ranks zero1 fp32 -> 1 rank zero1 fp32" in done.stderr
    *_, ends = done.stderr.partition("training ends after step 14: max_steps = 14")
    said = dict(re.findall(r"^\S+   (best|last|curves|try it) +(.*)$", ends, re.MULTILINE))
    end = events(run, "end")[-1]
    assert said["best"] == f"loss {end['best_score']:.4g} at step {end['best_step']}: {run / 'bundles' / 'best'}"
    assert said["last"] == str(run / "bundles" / "last")
    for name in ("curves", "try it"):  # what is named can be done
        program, *command = shlex.split(said[name])
        assert program == "dstrain"
        succeeds(dstrain(*command, stdin="the dog\n"))
    assert curve(run) == before
