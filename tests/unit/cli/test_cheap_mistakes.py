"""A mistake in arguments or paths is answered before torch is loaded: all of these in one process, which never imports it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

BUNDLE = str(ROOT / "tests" / "golden" / "tiny_bundle")
RECIPE = "translation/quickstart"
PROGRAM = """
import json, sys
from dstrain.cli.main import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    print(json.dumps([code, sorted({"torch", "deepspeed", "matplotlib"} & sys.modules.keys())]), flush=True)
"""
TRAIN = ["train", RECIPE, "--data", "none"]
ADAPTER = "adapter={rank: 2, alpha: 4, targets: [q_proj]}"
MISTAKES = {
    "an unknown recipe": (["train", "translation/quickstrt", "--data", "d", "--output", "r"], "did you mean"),
    "data that is missing": ([*TRAIN, "--output", "r"], "none/manifest.json is missing"),
    "output that is no run": ([*TRAIN, "--output", "text"], "--output text is a file; name a directory"),
    "two things to show": (["show", RECIPE, "--explain", "training"], "leave RECIPE, --set and --base out, or --explain"),
    "a teacher without an objective": ([*TRAIN, "--output", "r", "--teacher", BUNDLE], "has no use for a teacher"),
    "an adapter without a base": (
        [*TRAIN, "--output", "r", "--set", ADAPTER],
        "--base BUNDLE",
    ),
    "text that is missing": (
        ["prepare", RECIPE, "--output", "d", "--set", "data.train=[{kind: parallel, source: no.en, target: no.de}]"],
        "no.en",
    ),
    "no bundle to generate with": (["generate", "none", "--input", "text"], "none is not a bundle"),
    "no text to translate": (["generate", BUNDLE, "--input", "none"], "none: No such file"),
    "nothing to score": (["generate", BUNDLE, "--input", "text", "--score-only"], "add --reference FILE"),
    "output that is input": (["generate", BUNDLE, "--input", "text", "--output", "text"], "is the same as --input"),
    "output that exists": (["generate", BUNDLE, "--input", "text", "--output", "other"], "other exists; add --overwrite"),
    "output in place of a directory": (["generate", BUNDLE, "--input", "text", "--output", "."], ". is a directory; name a file"),
    "output that is part of the bundle": (
        ["generate", BUNDLE, "--input", "text", "--output", f"{BUNDLE}/model.yaml", "--overwrite"],
        "is part of BUNDLE",
    ),
    "output below a file": (["average", BUNDLE, "--output", "text/b"], "text is a file, not a directory"),
    "no bundle where one stands": (["generate", ".", "--input", "text"], ". is not a bundle"),
    "no bundle to talk to": (["interactive", "none"], "none is not a bundle"),
    "no data to validate on": (["validate", BUNDLE, "--data", "none"], "none/manifest.json is missing"),
    "no hypotheses": (["evaluate", "--hypothesis", "none", "--reference", "text"], "none: No such file"),
    "no run to report": (["report", "none"], "none/events.jsonl is missing"),
    "no run to average": (["average", "none", "--output", "b"], "none is neither a run"),
    "bundles that are none": (["average", BUNDLE, "none", "--output", "b"], "none is not a bundle"),
    "nothing to merge": (["merge", "none", "--output", "b"], "none is not a bundle"),
    "no checkpoint": (["consolidate", "none", "--output", "b"], "none is no checkpoint"),
    "nothing to inspect": (["inspect", "none"], "none is no prepared data"),
    "no teacher": (["dump-logits", "--teacher", "none", "--data", "none", "--output", "l"], "none is not a bundle"),
    "half the arguments": (["dump-logits", "--teacher", BUNDLE], "takes --teacher, --data and --output"),
    "no data to label": (["pseudo-label", "--teacher", BUNDLE, "--data", "none", "--output", "d"], "none/manifest.json"),
    "no text to write": (["text", "none", "--output", "t"], "none/manifest.json is missing"),
    "no checkpoint to import": (["import", "fairseq", "none.pt", "--output", "b"], "none.pt"),
    "no directory to import": (["import", "fairseq-data", "none", "--output", "d"], "none is no directory"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], str]]:
    """Exit code, heavy modules that are loaded by then, and message of each."""
    directory = tmp_path_factory.mktemp("mistakes")
    for name in ("text", "other"):
        (directory / name).write_text("precious\n")
    words = json.dumps([words for words, _ in MISTAKES.values()])
    command = [sys.executable, "-c", PROGRAM, words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment(), timeout=120, check=True)
    codes = [json.loads(line) for line in result.stdout.splitlines()]
    messages = result.stderr.splitlines()
    assert len(messages) == len(MISTAKES), result.stderr
    assert [(directory / name).read_text() for name in ("text", "other")] == ["precious\n"] * 2
    return {name: (*code, message) for name, code, message in zip(MISTAKES, codes, messages, strict=True)}


def environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_no_torch(name: str, answers: dict[str, tuple[int, list[str], str]]) -> None:
    code, heavy, message = answers[name]
    assert (code, heavy) == (1, [])
    assert MISTAKES[name][1] in message
