"""The verbs as Python functions: every docstring example of `dstrain.api` is run, in the order of a first training."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain import api
from dstrain.recipe_file import dump_recipe, load_recipe
from dstrain.training.curves import summary
from dstrain.training.events import read_events
from tests.unit.generation.small_bundle import make_decoder_only_bundle

VERBS = ("prepare", "estimate", "train", "dump_logits", "pseudo_label", "validate", "generate_file", "extend", "perplexity")
TINY = (
    "data.train.0.num_pairs=60",
    "data.valid.0.num_pairs=5",
    "data.test={}",
    "data.tokenizer.vocab_size=120",
    "batching.tokens_per_step=256",
    "batching.max_tokens=256",
    "model.model_dim=16",
    "model.position={kind: rotary}",
    "model.encoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "model.decoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "schedule.warmup_steps=10",
    "optimizer.learning_rate=0.01",
    "validation.every=30",
    "checkpoint.every=30",
    "generation.beam_size=10",
    "generation.length_penalty=-5.0",  # of a model that has learned next to nothing, only short outputs end
    "generation.max_length_ratio=1.0",
    "generation.max_length_offset=0",
)


def test_every_docstring_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(load_recipe("translation/quickstart", TINY)))
    (tmp_path / "in.txt").write_text("the dog sleeps .\n\nthe cat sees the dog .\n")
    make_decoder_only_bundle(tmp_path / "lm/bundles/best", trained_on="text")
    monkeypatch.chdir(tmp_path)
    for name in VERBS:
        examples = doctest.DocTestFinder(recurse=False).find(getattr(api, name), name, globs={})
        assert examples[0].examples, f"{name} has no example"
        output: list[str] = []
        result = doctest.DocTestRunner().run(examples[0], out=output.append)
        assert result.failed == 0, "".join(output)
    last = read_events(tmp_path / "run/events.jsonl")
    (signatures,) = (event["signatures"] for event in last if event["kind"] == "valid")
    assert "|tok:13a|" in signatures["bleu"]
    assert "|tok:13a|" in summary(last)["signature of bleu"]


def test_every_public_name_is_documented() -> None:
    assert set(VERBS) < set(api.__all__)
    assert all(getattr(api, name).__doc__ for name in api.__all__)


def test_importing_the_module_brings_no_library_that_takes_time() -> None:
    """Each name brings its own; `import dstrain.api` must not cost more than `import torch`."""
    heavy = {"torch", "numpy", "pydantic", "deepspeed", "pyarrow", "sentencepiece", "transformers", "sacrebleu", "rich"}
    program = "import sys, dstrain.api; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "dstrain.api" in loaded.split()
    assert not heavy & set(loaded.split())


def test_every_name_has_a_module_and_others_are_refused_by_name() -> None:
    assert set(api._MODULES) == set(api.__all__) == set(dir(api))
    with pytest.raises(AttributeError, match=r"'dstrain\.api' has no attribute 'trian'; it has BundleModel, .*train"):
        api.trian  # noqa: B018
