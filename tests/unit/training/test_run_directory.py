"""A run directory is made once, locked while it trains, resumed under the same recipe only, and never mistaken."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstrain.errors import CheckpointError, RecipeError, StorageError, TrainingError
from dstrain.training.accepted_changes import check_accepted
from dstrain.training.run_directory import Run, check_run, open_run, recipe_differences
from tests.paths import ROOT
from tests.unit.checkpoint.ranks import on_ranks
from tests.unit.training.fakes import ONE_PROCESS

RECIPE: dict[str, Any] = {
    "version": 1,
    "batching": {"tokens_per_step": 4096, "max_tokens": 4096},
    "model": {"kind": "encoder_decoder", "encoder": {"depth": 4}},
    "objective": {"chunk_tokens": 1024},
    "optimizer": {"learning_rate": 0.005, "betas": (0.9, 0.98)},
    "data": {"train": [{"kind": "tsv", "path": "a.tsv"}], "test": {}},
    "training": {"seed": 1, "max_steps": 100},
    "validation": {"patience": None, "metric": "loss", "every": 1, "generation": None},
    "checkpoint": {"unit": "epochs"},
    "engine": {"deepspeed": "zero1", "precision": "fp32", "clip_norm": 0.0},
    "reporting": {"log_every": 50},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    *sections, key = path.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[key] = value
    return tree


def begin(directory: Path) -> Run:
    """A run with something to resume."""
    run = open_run(directory, RECIPE, ONE_PROCESS, data="d1")
    (directory / "checkpoints" / "step_00000001").mkdir(parents=True)
    run.close()
    return run


def test_a_new_run_holds_the_recipe_and_an_id_that_stays(tmp_path: Path) -> None:
    run = begin(tmp_path / "deep" / "run")
    assert yaml.safe_load((tmp_path / "deep" / "run" / "recipe.yaml").read_text())["optimizer"]["betas"] == [0.9, 0.98]
    assert (run.checkpoints, run.bundles) == (run.directory / "checkpoints", run.directory / "bundles")
    again = open_run(tmp_path / "deep" / "run", RECIPE, ONE_PROCESS, data="d1")
    again.close()
    assert again.run_id == run.run_id
    assert len(run.run_id) == 16


def test_another_recipe_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    other = changed("model.encoder.depth", 6)
    other["optimizer"]["betas"] = [0.9, 0.999]
    del other["batching"]["tokens_per_step"]
    other["model"]["decoders"] = [{"depth": 2}]
    other["model"]["encoder"]["norm"] = None
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path / "run", other, ONE_PROCESS, data="d1")
    assert str(caught.value) == "\n".join(
        [
            f"{tmp_path}/run was started with another recipe; it is not resumed with this one:",
            "  batching.tokens_per_step: 4096 -> (absent)",
            '  model.decoders: (absent) -> [{"depth": 2}]',
            "  model.encoder.depth: 4 -> 6",
            "  model.encoder.norm: (absent) -> null",
            "  optimizer.betas[1]: 0.98 -> 0.999",
            "undo these changes to resume, or choose another --output to train afresh",
        ]
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.max_steps", 200),
        ("validation.patience", 3),
        ("validation.every", 7),
        ("validation.metric", "bleu"),
        ("data.train", [{"kind": "tsv", "path": "/elsewhere/a.tsv"}]),
        ("data.test", {"news": [{"kind": "tsv", "path": "news.tsv"}]}),
        ("reporting", {"log_every": 50, "wandb": {"project": "p", "name": "n"}}),
        ("validation.generation", {"kind": "beam", "beam_size": 2}),
        ("checkpoint.unit", "steps"),
        ("reporting.log_every", 1),
        ("batching.max_tokens", 2048),
        ("objective.chunk_tokens", "auto"),
        ("engine.deepspeed", "zero3"),
        ("engine.precision", "bf16"),
    ],
)
def test_what_does_not_change_the_result_may_change(tmp_path: Path, path: str, value: Any) -> None:
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()
    open_run(tmp_path / "run", changed(path, value), ONE_PROCESS, data="d1").close()
    assert recipe_differences(RECIPE, changed(path, value)) == []


def test_what_has_changed_is_logged_at_resume(tmp_path: Path) -> None:
    """Ranks, ZeRO stage and precision stand in the checkpoint."""
    begin(tmp_path / "run")
    recipe = changed("reporting.log_every", 10)
    recipe["engine"]["precision"] = "bf16"
    for _ in range(2):
        run = open_run(tmp_path / "run", recipe, ONE_PROCESS, data="d1")
        run.close()
        assert run.changes == ("reporting.log_every: 50 -> 10",)
    run = open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")
    run.close()
    assert run.changes == ()


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("engine.clip_norm", 1.0, "engine.clip_norm: 0.0 -> 1.0 (clips other gradients)"),
    ],
)
def test_what_decides_the_result_in_these_sections_is_refused_with_the_reason(
    tmp_path: Path, path: str, value: Any, line: str
) -> None:
    begin(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path / "run", changed(path, value), ONE_PROCESS, data="d1")
    assert f"\n  {line}\n" in str(caught.value)


def test_changes_are_accepted_by_key_and_recorded(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    slower = changed("optimizer.learning_rate", 0.001)
    with pytest.raises(CheckpointError, match=r"resume, accept them with --accept-changes optimizer\.learning_rate, or choose"):
        open_run(tmp_path / "run", slower, ONE_PROCESS, data="d1")
    for _ in range(2):  # the same command once more, and without the option
        for accept in (("optimizer.learning_rate",), ()):
            run = open_run(tmp_path / "run", slower, ONE_PROCESS, data="d1", accept=accept)
            run.close()
            assert run.changes == ("optimizer.learning_rate: 0.005 -> 0.001, accepted",)
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.005\n"):  # back is a change, too
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1", accept=["optimizer"]).close()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optimizer"]["learning_rate"] == 0.005


def test_an_accepted_change_does_not_cover_another(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    both = changed("optimizer.learning_rate", 0.001)
    both["optimizer"]["betas"] = [0.9, 0.999]
    both["engine"]["clip_norm"] = 1.0
    with pytest.raises(CheckpointError, match=r"accept them with --accept-changes engine\.clip_norm,optimizer\.betas, or"):
        open_run(tmp_path / "run", both, ONE_PROCESS, data="d1", accept=["optimizer.learning_rate"])
    with pytest.raises(CheckpointError, match="learning_rate"):  # nothing was recorded
        open_run(tmp_path / "run", changed("optimizer.learning_rate", 0.001), ONE_PROCESS, data="d1")
    run = open_run(tmp_path / "run", both, ONE_PROCESS, data="d1", accept=["optimizer", "engine.clip_norm"])
    run.close()
    assert [change.endswith(", accepted") for change in run.changes] == [True] * 3


def test_there_is_nothing_to_accept_in_a_new_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint: leave it out to begin with this recipe, or name the"):
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1", accept=["optimizer"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.encoder.depth", "only keys of optimizer, schedule, engine.clip_norm may change within a run"),
        ("engine.clip_normal", "only keys of"),
        ("optimizer.learning_rat", "the recipe has no such key; did you mean learning_rate?"),
    ],
)
def test_only_keys_of_optimizer_schedule_and_clipping_are_accepted(key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_accepted([key], RECIPE)
    check_accepted(["optimizer.betas", "optimizer", "engine.clip_norm"], RECIPE)


@pytest.mark.parametrize(("path", "value"), [("training.seed", 2), ("training.max_stepsize", 2), ("version", 2)])
def test_everything_else_counts(path: str, value: Any) -> None:
    assert len(recipe_differences(RECIPE, changed(path, value))) == 1


def test_a_section_that_goes_or_comes_is_one_line() -> None:
    adapter = {
        "kind": "lora",
        "rank": 8,
        "alpha": 16,
        "targets": ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj"],
    }
    with_one, without = {**RECIPE, "adapter": adapter}, {**RECIPE, "adapter": None}
    (gone,), (come,) = recipe_differences(with_one, without), recipe_differences(without, with_one)
    assert gone.startswith('  adapter: {"kind": "lora", "rank": 8, "alpha": 16, ')
    assert gone.endswith(" ... -> null")
    assert come.startswith('  adapter: null -> {"kind": "lora",')


def test_another_recipe_is_refused_before_data_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    slower = changed("optimizer.learning_rate", 0.001)
    with pytest.raises(CheckpointError, match=r"accept them with --accept-changes optimizer.learning_rate"):
        check_run(tmp_path / "run", slower)
    check_run(tmp_path / "run", slower, accept=["optimizer.learning_rate"])
    check_run(tmp_path / "new", slower)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_of_an_earlier_version_knows_its_data_by_their_preparation(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="content", preparation="d1").close()
    with pytest.raises(CheckpointError, match=r"was started on other data \(d1, this is content\)"):
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="content", preparation="d2")


def test_a_directory_that_is_no_run_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match=r"is no run \(it has no run.json\) and not empty \(it holds thesis.tex\)"):
        open_run(tmp_path, RECIPE, ONE_PROCESS, data="d1")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "recipe.yaml").write_text("of a bundle")
    with pytest.raises(TrainingError, match=r"has no run.json\) and not empty \(it holds recipe.yaml, thesis.tex\)"):
        open_run(tmp_path, RECIPE, ONE_PROCESS, data="d1")
    with pytest.raises(TrainingError, match="is a file; name a directory"):
        open_run(tmp_path / "thesis.tex", RECIPE, ONE_PROCESS, data="d1")


def test_a_recipe_that_lies_in_the_output_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("my: own\n")
    with pytest.raises(TrainingError, match=r"is no run \(it has no run.json\) and not empty \(it holds recipe.yaml\)"):
        open_run(tmp_path, RECIPE, ONE_PROCESS, data="d1")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my: own\n"]


def test_an_empty_directory_is_welcome(tmp_path: Path) -> None:
    open_run(tmp_path, RECIPE, ONE_PROCESS, data="d1").close()
    assert (tmp_path / "recipe.yaml").is_file()


def test_a_run_that_lost_its_checkpoints_is_not_restarted_silently(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()
    (tmp_path / "run" / "events.jsonl").write_text('{"time": 1.0, "kind": "checkpoint", "step": 10}\n')
    with pytest.raises(CheckpointError, match=r"events.jsonl reports checkpoints, but .*checkpoints holds none"):
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()
    (tmp_path / "run" / "events.jsonl").write_text('{"time": 1.0, "kind": "train", "step": 10}\n')
    open_run(tmp_path / "run", changed("training.seed", 2), ONE_PROCESS, data="d1").close()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["seed"] == 2


@pytest.mark.parametrize(
    ("name", "content"), [("recipe.yaml", "a: [1"), ("run.json", "{"), ("run.json", '{"format": 9, "run_id": "x"}')]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")


def test_a_kill_while_it_is_made_does_not_spoil_the_directory(tmp_path: Path) -> None:
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()
    (tmp_path / "run" / "recipe.yaml").rename(tmp_path / "run" / "recipe.yaml.tmp")
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_two_trainings_never_share_a_run(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.training.test_run_directory import RECIPE, ONE_PROCESS, open_run
run = open_run(Path({str(tmp_path / "run")!r}), RECIPE, ONE_PROCESS, data="d1")
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        message = rf"another training is running in .*run \(process {holder.pid} on .*\): wait for it"
        for _ in range(2):  # to ask first changes nothing
            with pytest.raises(TrainingError, match=message):
                check_run(tmp_path / "run", RECIPE)
            with pytest.raises(TrainingError, match=message):
                open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")
        holder.kill()
    check_run(tmp_path / "run", RECIPE)
    with closing(open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1")):
        for _ in range(2):
            with pytest.raises(TrainingError, match=r"another training is running in .*this one"):
                check_run(tmp_path / "run", RECIPE)
    check_run(tmp_path / "run", RECIPE)


def test_all_ranks_learn_the_id_and_the_refusal(tmp_path: Path) -> None:
    ids = on_ranks(3, lambda ranks: open_run(tmp_path / "run", RECIPE, ranks, data="d1").run_id)
    assert len(set(ids)) == 1
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    refusals = on_ranks(3, lambda ranks: open_run(tmp_path / "run", changed("training.seed", 2), ranks, data="d1"))
    assert all(isinstance(refusal, CheckpointError) for refusal in refusals)
    assert len({str(refusal) for refusal in refusals}) == 1


def test_a_directory_that_cannot_be_made_is_named() -> None:
    with pytest.raises(StorageError, match=r"--output /proc/nowhere/run: No such file or directory; choose a directory"):
        open_run(Path("/proc/nowhere/run"), RECIPE, ONE_PROCESS, data="d1")


def test_other_data_are_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"was started on other data \(d1, this is d2\).*name the --data it was started on"):
        open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d2")
    open_run(tmp_path / "run", RECIPE, ONE_PROCESS, data="d1").close()


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    open_run(directory, RECIPE, ONE_PROCESS, data="d1", teachers=["t1", "t2"]).close()
    (directory / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"was started with another teacher \(t1 t2, this is t2 t1\): name the first one"):
        open_run(directory, RECIPE, ONE_PROCESS, data="d1", teachers=["t2", "t1"])
    with pytest.raises(CheckpointError, match=r"another teacher \(t1 t2, this is none\)"):
        open_run(directory, RECIPE, ONE_PROCESS, data="d1")
    open_run(directory, RECIPE, ONE_PROCESS, data="d1", teachers=["t1", "t2"]).close()
