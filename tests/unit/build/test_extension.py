"""An extended bundle: the same weights, another context; and a recipe that extends the bundle it starts from."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dstrain.api import ExtendOptions, extend, load, load_recipe, prepare
from dstrain.build.base import find_base
from dstrain.checkpoint.bundle import find_bundle, save_bundle
from dstrain.cli.main import main
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.sources.grammar import sentence_pairs
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.errors import BundleError
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.position_config import LinearScaling, RotaryPosition, YarnScaling
from dstrain.models.weights import to_canonical
from dstrain.recipe import Recipe
from dstrain.recipe_file import dump_recipe
from tests.e2e.support import dstrain, succeeds
from tests.unit.adapters.adapted import adapt

SMALL = (
    "data.tokenizer.vocab_size=90",
    "model.model_dim=16",
    "model.decoder={depth: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 8}",
    "batching={tokens_per_step: 300, max_tokens: 1200}",
    "model.max_target_length=1024",
    "training.max_steps=2",
    "validation.every=2",
    "checkpoint.every=2",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """language_modeling/wikitext_extend of a toy model, on one long line of grammar in four."""
    text = tmp_path_factory.mktemp("text") / "lines.txt"
    lines = [english for english, _ in islice(sentence_pairs("train", 1), 120)]
    text.write_text("\n".join([*lines[:60], " ".join(lines[60:80]), " ".join(lines[80:])]) + "\n")
    corpora = [f"data.{split}=[{{kind: text, path: {text}}}]" for split in ("train", "valid")]
    return load_recipe("language_modeling/wikitext_extend", [*SMALL, *corpora])


@pytest.fixture(scope="module")
def data(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "data"
    prepare(recipe.data, directory, workers=1, progress=False)
    return directory


@pytest.fixture(scope="module")
def base(recipe: Recipe, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's model as it was before the extension, of 256 tokens."""
    directory = tmp_path_factory.mktemp("base") / "base"
    model = recipe.model.model_copy(update={"position": RotaryPosition(), "max_target_length": 256})
    pair = load_tokenizers(data / "tokenizer")
    sizes = VocabularySizes.of(pair.source, pair.target)
    weights = to_canonical(build_model(model, sizes, seed=3))
    save_bundle(directory, model_config=model, vocabulary=sizes, weights=weights, tokenizers=pair, recipe=None)
    return directory


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_the_verb_changes_what_long_text_computes_and_no_weight(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "longer"
    assert main(["extend", str(base), "--factor", "4", "--kind", kind, "--output", str(longer)]) == 0
    assert capsys.readouterr().out == f"{base} extended 4 times by {kind}: it reads 1,024 tokens -> {longer}\n"
    before, after = (load_file(path / "model.safetensors") for path in (base, longer))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    model = load(longer)
    assert model.tokenizer.fingerprint == load(base).tokenizer.fingerprint
    assert find_bundle(longer).notes == {"extended_from": str(base)}
    row = [2, *np.random.default_rng(1).integers(4, 90, 1000).tolist()]
    (logits,) = model.logits(None, [row])
    assert np.isfinite(logits).all()
    short = [found.logits(None, [row[:200]])[0] for found in (load(base), model)]
    assert np.abs(short[0] - short[1]).max() > 1e-4, "scaling acts on short text too"


def test_a_recipe_extends_its_base(recipe: Recipe, data: Path, base: Path, tmp_path: Path) -> None:
    """As `dstrain extend` and a recipe of the extended model would: the same weights after two steps."""
    assert recipe.model.position == RotaryPosition(scaling=YarnScaling(factor=4, original_length=256))
    longer = tmp_path / "longer"
    assert extend(ExtendOptions(bundle=base, output=longer, kind="yarn", factor=4)) == recipe.model
    (tmp_path / "extend.yaml").write_text(dump_recipe(recipe))
    runs = [tmp_path / "run", tmp_path / "again"]
    for run, start in zip(runs, (base, longer), strict=True):
        succeeds(dstrain("train", tmp_path / "extend.yaml", "--data", data, "--output", run, "--base", start))
    first, second = (find_bundle(run / "bundles/last") for run in runs)
    assert first.description.model == recipe.model
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != find_bundle(longer).fingerprint


def test_an_adapter_is_merged_wherever_its_base_is_now(base: Path, tmp_path: Path) -> None:
    home = shutil.copytree(base, tmp_path / "base")
    adapted = adapt(tmp_path / "adapted", home, seed=1)
    extend(ExtendOptions(bundle=adapted, base=home.rename(tmp_path / "moved"), output=tmp_path / "longer", kind="ntk", factor=2))
    stored, merged = find_bundle(tmp_path / "longer"), find_bundle(adapted, tmp_path / "moved")
    assert not stored.adapters
    assert all(stored.read(name).equal(merged.read(name)) for name in merged.names())
    query = "decoder.layers.0.self_attention.q_proj.weight"
    assert not stored.read(query).equal(find_bundle(base).read(query))


def test_an_extension_begins_at_an_unscaled_base_and_not_under_an_adapter(
    recipe: Recipe, data: Path, base: Path, tmp_path: Path
) -> None:
    manifest, linear = load_manifest(data), tmp_path / "linear"
    with pytest.raises(BundleError, match=r'model\.position\.scaling.*"none"'):
        find_base(base, recipe.model, manifest, adapted=True)
    extend(ExtendOptions(bundle=base, output=linear, kind="linear", factor=4))
    with pytest.raises(BundleError, match=r'model\.position\.scaling.*"linear"'):
        find_base(linear, recipe.model, manifest)
    unscaled = recipe.model.model_copy(update={"position": RotaryPosition()})
    with pytest.raises(BundleError, match=r'model\.position\.scaling.*"linear"'):
        find_base(linear, unscaled, manifest)
    other = recipe.model.model_copy(update={"position": RotaryPosition(theta=99, scaling=LinearScaling(factor=2))})
    with pytest.raises(BundleError, match=r"\n  model\.position\.theta: 10000\.0 -> 99\.0\ngive"):
        find_base(base, other, manifest)


def test_mistakes_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str, kind: str = "yarn", factor: str = "2") -> str:
        try:
            assert main(["extend", *words, "--kind", kind, "--factor", factor]) == 1
        except SystemExit as usage:
            assert usage.code == 2
        return capsys.readouterr().err

    longer = str(tmp_path / "longer")
    assert "--factor: factor = 0.5 is not a number from 1 on" in error(str(base), "--output", longer, factor="0.5")
    assert "'rope' is unknown; choose one of linear, ntk, yarn" in error(str(base), "--output", longer, kind="rope")
    extend(ExtendOptions(bundle=base, output=Path(longer), kind="ntk", factor=2))
    assert "longer exists; add --overwrite to replace it" in error(str(base), "--output", longer)
    again = error(longer, "--output", str(tmp_path / "again"))
    assert f"{longer}: position.scaling.kind = ntk: the model is extended already; name the one that it was made from" in again
    assert not (tmp_path / "again").exists()
    beyond = error(str(base), "--output", longer, "--overwrite", "--original-length=999")
    assert "original_length = 999, but the model reads 256 tokens and was trained with no more; lower it" in beyond
