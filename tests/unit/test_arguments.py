"""Every wrong argument of a Python call is named before anything runs: which one, which item, of what type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dstrain.api import (
    BundleModel,
    DumpOptions,
    GenerateOptions,
    LabelOptions,
    TeacherOptions,
    TrainOptions,
    ValidateOptions,
    dump_logits,
    generate_file,
    load,
    load_recipe,
    prepare,
    pseudo_label,
    train,
    validate,
)
from dstrain.errors import ArgumentError
from tests.unit.generation.small_bundle import make_bundle, make_decoder_only_bundle

HERE = Path()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BundleModel:
    """Vocabularies of 17 and 16 ids; 16 tokens a side."""
    return load(make_bundle(tmp_path_factory.mktemp("arguments") / "bundle"))


WRONG_CALLS: list[tuple[Callable[[Any], object], str]] = [
    (lambda model: model.generate("one two"), "sentences = 'one two' is one str; give a list of texts"),
    (lambda model: model.generate(b"one two"), "sentences = b'one two' is one bytes; give a list of texts"),
    (lambda model: model.generate(None), "sentences is None (None); give a list of texts"),
    (lambda model: model.generate({"one"}), "sentences is set ({'one'}); give a list of texts"),
    (lambda model: model.generate(["one", 2]), "sentences[1] is int (2); give a text"),
    (lambda model: model.generate(["one", None]), "sentences[1] is None (None); give a text"),
    (lambda model: model.generate([["one"]]), "sentences[0] is list (['one']); give a text"),
    (lambda model: model.generate(["ok", "a\udc80"]), "sentences[1] ('a\\udc80') holds half a surrogate pair"),
    (lambda model: model.generate(["one"], prefixes="eins"), "prefixes = 'eins' is one str; give a list of texts"),
    (lambda model: model.generate(["one", "two"], prefixes=["eins"]), "2 sentences but 1 prefixes; give one for each"),
    (lambda model: model.score("one", ["eins"]), "sources = 'one' is one str; give a list of texts"),
    (lambda model: model.score(["one"], [1.5]), "targets[0] is float (1.5); give a text"),
    (lambda model: model.score(["one", "two"], ["eins"]), "2 sources but 1 targets; give one for each"),
    (lambda model: model.logits([[5, 2]], [[2], [2]]), "1 source_ids but 2 target_input_ids; give one for each"),
    (lambda model: model.logits([[5, 17, 2]], [[2]]), "source_ids[0][1] = 17 is no id of the vocabulary, which has 0 to 16"),
    (
        lambda model: model.logits([[5, 2]], [[2, 16]]),
        "target_input_ids[0][1] = 16 is no id of the vocabulary, which has 0 to 15",
    ),
    (lambda model: model.logits([[5, 2]], [[2, -1]]), "target_input_ids[0][1] = -1 is no id of the vocabulary"),
    (lambda model: model.logits([[5, 2.0]], [[2]]), "source_ids[0][1] is float (2.0); give a whole number"),
    (lambda model: model.logits([[True]], [[2]]), "source_ids[0][0] is bool (True); give a whole number"),
    (lambda model: model.logits(["one"], [[2]]), "source_ids[0] = 'one' is one str; give a list of ids"),
    (lambda model: model.logits([5, 2], [[2]]), "source_ids[0] is int (5); give a list of ids"),
    (lambda model: model.logits([[5, 2]], [[]]), "target_input_ids[0] has 0 ids; the model reads 1 to 16"),
    (lambda model: model.logits([[5] * 17], [[2]]), "source_ids[0] has 17 ids; the model reads 1 to 16"),
    (lambda model: model.logits(None, [[2]]), "source_ids = None, but an encoder-decoder model reads sources"),
    (lambda model: load(3), "bundle = 3 is no path; give a text or a Path"),
    (lambda model: load(""), "bundle = '' is no path; give a text or a Path"),
    (lambda model: load(HERE, device=3), "device '3' is unknown; choose cpu, cuda, cuda:N or auto"),
    (
        lambda model: load_recipe("translation/quickstart", "training.max_steps=3"),
        "overrides = 'training.max_steps=3' is one str",
    ),
    (lambda model: load_recipe(None), "name_or_path = None is no path; give a text or a Path"),
    (
        lambda model: prepare(load_recipe("translation/quickstart"), HERE, workers=1),
        ", not DataConfig; give the `data` of a recipe",
    ),
    (lambda model: train("tiny.yaml", None), "recipe is str ('tiny.yaml'), not Recipe; read one by load_recipe(name or file)"),
    (lambda model: train(load_recipe("translation/quickstart"), "run"), "options is str ('run'), not TrainOptions"),
    *(
        (lambda model, verb=verb: verb("x"), "options is str ('x'), not ")
        for verb in (validate, dump_logits, pseudo_label, generate_file)
    ),
    (lambda model: GenerateOptions(bundle=3), "GenerateOptions.bundle: input should be a path, not 3"),
    (lambda model: GenerateOptions(bundle=HERE, format="xml"), "GenerateOptions.format: input should be 'text', 'jsonl' or"),
    (
        lambda model: GenerateOptions(bundle=HERE, method="beam"),
        "GenerateOptions.method: input should be a valid dictionary, not 'beam'",
    ),
    (
        lambda model: ValidateOptions(bundle=HERE, data=HERE, max_tokens="five"),
        "ValidateOptions.max_tokens: input should be a valid",
    ),
    (
        lambda model: validate(ValidateOptions(bundle=HERE, data=HERE, generate=False, tokenize="char")),
        "tokenize is about translations, and generate = False (--no-generate) makes none; leave one out",
    ),
    (
        lambda model: ValidateOptions(bundle=HERE, data=HERE, device="gpu"),
        "ValidateOptions.device: input should be 'auto', 'cpu'",
    ),
    (
        lambda model: ValidateOptions(bundle=HERE, data=HERE, precision="fp8"),
        "ValidateOptions.precision: input should be 'auto', ",
    ),
    (lambda model: TeacherOptions(bundles="teacher"), "TeacherOptions.bundles: input should be a valid tuple, not 'teacher'"),
    (lambda model: TeacherOptions(bundles=["a", 2]), "TeacherOptions.bundles.1: input should be a path, not 2"),
    (lambda model: TrainOptions(data=HERE, output=HERE, teachers="x"), "TrainOptions.teachers: input should be"),
    (lambda model: DumpOptions(teacher=HERE, data=HERE, output=HERE, worker="0/2"), "DumpOptions.worker: input should be"),
    (lambda model: LabelOptions(teacher=HERE, data=None, output=HERE), "LabelOptions.data: input should be a path, not None"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS, ids=[message[:60] for _, message in WRONG_CALLS])
def test_a_wrong_argument_is_named(call: Callable[[Any], object], message: str, model: BundleModel) -> None:
    with pytest.raises(ArgumentError) as caught:
        call(model)
    assert message in str(caught.value)


def test_what_can_become_the_declared_type_does() -> None:
    options = ValidateOptions(bundle="run/bundles/best", data="data", device=torch.device("cpu"))  # type: ignore[arg-type]
    assert (options.bundle, options.device) == (Path("run/bundles/best"), "cpu")
    assert TeacherOptions(bundles=["a", Path("b")]).bundles == (Path("a"), Path("b"))  # type: ignore[arg-type]
    assert TrainOptions(data=HERE, output=HERE).teachers == TeacherOptions()
    assert GenerateOptions(bundle=HERE, input=Path("in.txt")).input == "in.txt"  # type: ignore[arg-type]


def test_any_ordered_collection_is_a_list(model: BundleModel) -> None:
    expected = [hypotheses[0].text for hypotheses in model.generate(["one two", "three"])]
    for sentences in (("one two", "three"), iter(["one two", "three"]), np.array(["one two", "three"])):
        assert [hypotheses[0].text for hypotheses in model.generate(sentences)] == expected  # type: ignore[arg-type]
    (row,) = model.logits([[5, 6, 2]], [[2, 4]])
    for kind in (np.array, torch.tensor):
        (other,) = model.logits(kind([[5, 6, 2]]), [kind([2, 4])])
        np.testing.assert_array_equal(other, row)


def test_a_device_of_torch_is_a_device(tmp_path: Path) -> None:
    assert load(make_bundle(tmp_path / "bundle"), device=torch.device("cpu")).device == "cpu"


def test_source_and_target_of_a_decoder_only_model_share_its_length(tmp_path: Path) -> None:
    model = load(make_decoder_only_bundle(tmp_path / "bundle", trained_on="parallel"))
    assert model.logits([[5] * 10 + [2]], [[2] * 6])[0].shape[0] == 6
    with pytest.raises(
        ArgumentError, match=r"target_input_ids\[1\] has 7 ids after 11 of the source; the model reads at most 6 there"
    ):
        model.logits([[2], [5] * 10 + [2]], [[2], [2] * 7])
