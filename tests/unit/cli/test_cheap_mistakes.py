"""A mistake in arguments or paths is answered before torch is loaded: all of these in one process, which never imports it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dstrain.errors import TrainingError
from dstrain.storage.lock import locked_output
from tests.paths import ROOT
from tests.unit.evaluation.test_bundle_validation import prepared

BUNDLE = str(ROOT / "tests" / "golden" / "tiny_bundle")
RECIPE = "translation/quickstart"
PROGRAM = """
import contextlib, io, json, sys
from dstrain.cli.main import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as message:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, sorted({"torch", "deepspeed", "matplotlib"} & sys.modules.keys()), message.getvalue()]), flush=True)
"""
TRAIN = ["train", RECIPE, "--data", "none"]
ADAPTER = "adapter={rank: 2, alpha: 4, targets: [q_proj]}"
MISTAKES = {
    "an unknown recipe": (["train", "translation/quickstrt", "--data", "d", "--output", "r"], "did you mean"),
    "data that is missing": ([*TRAIN, "--output", "r"], "none/manifest.json is missing"),
    "data of another recipe": (["train", RECIPE, "--data", "data", "--output", "r"], "train[0].num_pairs: 60 -> 20000"),
    "a run that is trained in already": ([*TRAIN, "--output", "held"], "another training is running in held (process "),
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
    "a beam without translations": (
        ["validate", BUNDLE, "--data", "data", "--no-generate", "--beam-size", "2"],
        "beam_size is about translations",
    ),
    "a method that is not chosen": (["generate", BUNDLE, "--input", "text", "--top-k", "5"], "no effect in beam search"),
    "the same in a dialog": (["interactive", BUNDLE, "--groups", "5", "--sampling"], "no effect in sampling"),
    "a beam that is too small": (["validate", BUNDLE, "--data", "data", "--beam-size", "0"], "'0' is not a whole number from 1"),
    "a device that is none": (["generate", BUNDLE, "--input", "text", "--device", "gpu"], "device 'gpu' is unknown; choose cpu"),
    "a base of a plain bundle": (
        ["generate", BUNDLE, "--input", "text", "--base", BUNDLE],
        "rests on no other; leave",
    ),
    "no hypotheses": (["evaluate", "--hypothesis", "none", "--reference", "text"], "none: No such file"),
    "no run to report": (["report", "none"], "none/events.jsonl is missing"),
    "no run to average": (["average", "none", "--output", "b"], "none is neither a run"),
    "bundles that are none": (["average", BUNDLE, "none", "--output", "b"], "none is not a bundle"),
    "nothing to merge": (["merge", "none", "--output", "b"], "none is not a bundle"),
    "a plain bundle to merge": (["merge", BUNDLE, "--output", "b"], "is a plain bundle already"),
    "nothing to extend": (["extend", "none", "--factor", "2", "--kind", "yarn", "--output", "b"], "none is not a bundle"),
    "a shorter context": (["extend", BUNDLE, "--factor", "0.5", "--kind", "ntk", "--output", "b"], "is not a number from 1 on"),
    "no bundle to score a text with": (["perplexity", "none", "text"], "none is not a bundle"),
    "no text to score": (["perplexity", BUNDLE, "none"], "none: No such file"),
    "windows with gaps": (
        ["perplexity", BUNDLE, "text", "--context-window", "8", "--stride", "9"],
        "stride = 9 (--stride) exceeds context_window = 8",
    ),
    "windows that stand still": (["perplexity", BUNDLE, "text", "--stride", "0"], "'0' is not a whole number from 1 on"),
    "no adapter to import": (["import", "peft", BUNDLE, "--base", BUNDLE, "--output", "b"], "has no adapter_config.json"),
    "no adapter to generate with": (
        ["generate", BUNDLE, "--adapter", BUNDLE, "--input", "text"],
        "is no adapter: it is no adapter",
    ),
    "nothing to export": (["export", "none", "--format", "ctranslate2", "--output", "b"], "none is not a bundle"),
    "an export over a text": (
        ["export", BUNDLE, "--format", "ctranslate2", "--output", "text", "--overwrite"],
        "text exists and is not a CTranslate2 model",
    ),
    "a format of no program": (["export", BUNDLE, "--format", "onnx", "--output", "b"], "'onnx' is unknown; "),
    "no checkpoint": (["consolidate", "none", "--output", "b"], "none is no checkpoint"),
    "nothing to inspect": (["inspect", "none"], "none is no prepared data"),
    "no teacher": (["dump-logits", "--teacher", "none", "--data", "none", "--output", "l"], "none is not a bundle"),
    "half the arguments": (["dump-logits", "--teacher", BUNDLE], "takes --teacher, --data and --output"),
    "no data to label": (["pseudo-label", "--teacher", BUNDLE, "--data", "none", "--output", "d"], "none/manifest.json"),
    "an option of another method": (
        ["dump-logits", "--teacher", BUNDLE, "--data", "data", "--output", "l", "--k", "5"],
        "--k does not go with --method sample",
    ),
    "lengths that drop everything": (
        ["pseudo-label", "--teacher", BUNDLE, "--data", "data", "--output", "d", "--max-ratio", "0.5"],
        "--max-ratio 0.5 would drop every pair of unequal lengths",
    ),
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
    prepared(directory / "data", 90)
    words = json.dumps([words for words, _ in MISTAKES.values()])
    command = [sys.executable, "-c", PROGRAM, words]
    with locked_output(directory / "held", busy=TrainingError):
        printed = subprocess.check_output(command, text=True, cwd=directory, env=environment(), timeout=120)
    assert [(directory / name).read_text() for name in ("text", "other")] == ["precious\n"] * 2
    return dict(zip(MISTAKES, map(json.loads, printed.splitlines()), strict=True))


def environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_no_torch(name: str, answers: dict[str, tuple[int, list[str], str]]) -> None:
    code, heavy, message = answers[name]
    assert (code in (1, 2), heavy) == (True, [])
    assert MISTAKES[name][1] in message
