"""A bundle written by the first version keeps translating: what users have must stay readable."""

import json

import pytest
import torch

from dstrain.api import BundleModel, load
from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "tiny_bundle.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> BundleModel:
    return load(GOLDEN / "tiny_bundle")


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_same_translations(model: BundleModel, beam_size: int) -> None:
    found = model.generate(EXPECTED["source"], beam_size=beam_size)
    assert [hypotheses[0].text for hypotheses in found] == EXPECTED["translations"]


def test_the_same_ids_and_logits(model: BundleModel) -> None:
    eos = model.tokenizer.source.eos_id
    ids = [[*row, eos] for row in model.tokenizer.source.encode(EXPECTED["source"])]
    assert ids == EXPECTED["source_ids"]
    logits = model.logits(ids[:2], [[eos], [eos]])
    found = torch.tensor([row[0].tolist() for row in logits])
    torch.testing.assert_close(found, torch.tensor(EXPECTED["first_logits"]), rtol=1e-5, atol=1.5e-5)
