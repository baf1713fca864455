"""`dstrain prepare` as a process of its own: interrupted, killed, out of room, and its memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dstrain.cli.main import main
from dstrain.data.prepared.dataset import open_dataset
from tests.paths import ROOT
from tests.unit.data.corpus import data_config, parallel, sentences, tree

SHARDS = 16


def recipe(folder: Path, number: int, **changes: object) -> Path:
    """The quickstart recipe with another data section."""
    content = yaml.safe_load((ROOT / "dstrain/recipes/translation/quickstart.yaml").read_text())
    content["data"] = data_config(folder, number, **changes).model_dump(mode="json")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(recipe_file: Path, output: Path, workers: int, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dstrain", "prepare", str(recipe_file), "--output", str(output), "--workers", str(workers)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )  # type: ignore[call-overload, no-any-return]


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A recipe of 32,000 pairs in 16 shards, and what it makes."""
    folder = tmp_path_factory.mktemp("job")
    path = recipe(folder, 2000 * SHARDS, pairs_per_shard=2000)
    code, text = finish(start(path, folder / "data", 1))
    assert code == 0, text
    return path, tree(folder / "data")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(
    job: tuple[Path, dict[str, bytes]], tmp_path: Path, workers: int
) -> None:
    path, whole = job
    data = tmp_path / "data"
    process = start(path, data, workers)
    wait_for(lambda: len(list(data.glob("train/*.arrow"))) >= 3, process)
    workers_before = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    code, text = finish(process)
    assert code == 130
    assert f"interrupted; finished shards stay in {data}: run the same command again to go on" in text
    assert "Traceback" not in text
    wait_for_end(workers_before)
    kept = {path: path.stat().st_mtime_ns for path in data.glob("train/*.arrow")}
    assert 3 <= len(kept) < SHARDS
    assert not list(data.rglob("*.tmp"))
    code, text = finish(start(path, data, workers))
    assert code == 0, text
    assert tree(data) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_ctrl_c_during_tokenizer_training(job: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, whole = job
    process = start(path, tmp_path / "data", 2)
    wait_for(lambda: len(children(process.pid)) == 2, process)  # the trainer, and Python's resource tracker
    os.killpg(process.pid, signal.SIGINT)
    code, text = finish(process)
    assert (code, "Traceback" in text) == (130, False), text
    assert finish(start(path, tmp_path / "data", 2))[0] == 0
    assert tree(tmp_path / "data") == whole


def test_a_killed_run_leaves_no_workers_and_goes_on(job: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, whole = job
    data = tmp_path / "data"
    process = start(path, data, 2)
    wait_for(lambda: len(list(data.glob("train/*.arrow"))) >= 2, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    wait_for_end(workers)
    assert finish(start(path, data, 2))[0] == 0
    assert tree(data) == whole


def test_a_killed_worker_is_reported_and_nothing_finished_is_lost(job: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, whole = job
    data = tmp_path / "data"
    process = start(path, data, 2)
    wait_for(lambda: len(list(data.glob("train/*.arrow"))) >= 2, process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    code, text = finish(process)
    assert code == 1
    assert (
        "a worker process ended with exit code -9 (out of memory?); finished files are kept: run the same command again" in text
    )
    assert "Traceback" not in text
    assert len(list(data.glob("train/*.arrow"))) >= 2
    assert finish(start(path, data, 2))[0] == 0
    assert tree(data) == whole


def test_no_space_for_a_file_is_one_message(job: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """The operating system itself refuses: no file may grow beyond 30,000 bytes."""
    path, whole = job

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    code, text = finish(start(path, tmp_path / "data", 1, preexec_fn=limit))
    assert code == 1
    assert "no space left to write" in text
    assert "free some space and run the same command again" in text
    assert "Traceback" not in text
    assert finish(start(path, tmp_path / "data", 1))[0] == 0
    assert tree(tmp_path / "data") == whole


def test_the_verb_prepares_reports_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, 300)
    words = ["prepare", str(path), "--output", str(tmp_path / "data"), "--workers", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'data'} is ready\ntokenizer: 60 shared entries\ntrain: 300 pairs" in out
    assert "dropped 0 of 300: none" in out
    assert main(words) == 0
    assert "was finished before; nothing to do" in capsys.readouterr().out
    assert main([*words, "--set", "data.filter.max_source_length=9"]) == 1
    assert "belongs to another preparation (its recipe differs in data.filter)" in capsys.readouterr().err
    assert main([*words, "--set", "data.filter.max_source_length=9", "--overwrite"]) == 0
    assert open_dataset(tmp_path / "data", "train").source_lengths.max() <= 9


MEASURE = """
import json, resource, sys
from pathlib import Path
from dstrain.data.config import DataConfig
from dstrain.data.prepared.prepare import prepare

if __name__ == "__main__":
    config = DataConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    prepare(config, Path(sys.argv[2]), workers=int(sys.argv[3]))
    status = Path("/proc/self/status").read_text()  # getrusage would count what ran before exec
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_ten_times_larger_corpus_costs_no_more_memory(tmp_path: Path, workers: int) -> None:
    """Peak resident memory, of this process and of the largest of its workers: 4 MB of text against 40 MB."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    peaks = []
    for factor in (1, 10):
        folder = tmp_path / f"{factor}"
        folder.mkdir()
        lines = sentences(200)
        text = [" ".join(lines[(row + shift) % 200] for shift in (0, 7, 50)) for row in range(25_000)] * factor
        config = data_config(
            folder,
            train=[parallel(folder, "large", text, text)],
            pairs_per_shard=60_000,
            tokenizer={"kind": "sentencepiece", "model_type": "unigram", "vocab_size": 26, "max_training_lines": 2000},
        )
        (folder / "config.json").write_text(config.model_dump_json())
        command = [sys.executable, str(script), str(folder / "config.json"), str(folder / "data"), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout))
        assert len(open_dataset(folder / "data", "train")) == 25_000 * factor
    for small, large in zip(*peaks, strict=True):
        assert large <= 1.2 * small, peaks
