"""Generation on a GPU finds what the CPU finds."""

from pathlib import Path

import pytest
import torch

from dstrain.api import load
from tests.unit.generation.small_bundle import SENTENCES, make_bundle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

OPTIONS = {
    "beam": {"beam_size": 4, "num_best": 3},
    "constraints": {"beam_size": 4, "no_repeat_ngram": 2, "min_length": 3, "unk_penalty": 1.0, "temperature": 0.7},
    "groups": {"beam_size": 4, "groups": 2, "num_best": 4},
    "sampling": {"kind": "sampling", "num_best": 3, "top_k": 6, "top_p": 0.9, "seed": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_hypotheses_equal_the_cpus(name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    cpu, gpu = (load(bundle, device=device, precision="fp32").generate(SENTENCES, **OPTIONS[name]) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    for expected, found in zip(cpu, gpu, strict=True):
        assert [h.text for h in found] == [h.text for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], rel=1e-4)


def test_forced_scores_and_logits_equal_the_cpus(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    cpu, gpu = load(bundle), load(bundle, device="cuda", precision="fp32")
    scores = [model.score(["one two", "three"], ["eins", "zwei drei vier"]) for model in (cpu, gpu)]
    assert [h.score for h in scores[1]] == pytest.approx([h.score for h in scores[0]], rel=1e-4)
    logits = [model.logits([[5, 6, 2]], [[2, 4, 5]])[0] for model in (cpu, gpu)]
    assert logits[1].tolist() == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in logits[0].tolist()]
