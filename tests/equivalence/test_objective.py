"""The objective of training gives the loss, the negative log-likelihood and the gradients that the predecessor computed."""

import json

import numpy as np
import pytest
import torch

from dstrain.batch import Batch
from dstrain.models.weights import parameter_layouts, split_parameters
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from tests.batches import recorded
from tests.equivalence.test_fairseq_models import arrays, fairseq_name, imported, right_padded
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden


VARIANTS = ["ref/a_base", "ref/b_prenorm_learned_lnemb", "ref/b_prenorm_sinusoidal", "ref/c_share_all", "ref/c_share_dec_inout"]


def module_and_batch(variant: str, chunk_tokens: int) -> tuple[TrainModule, Batch]:
    golden = arrays(variant)
    source, inputs = (right_padded(golden[name]) for name in ("src_tokens_rightpad", "prev_output_tokens"))
    batch = recorded(source, inputs, golden["target"])
    config = CrossEntropyConfig(label_smoothing=0.1, chunk_tokens=chunk_tokens)
    return TrainModule(imported(variant), build_cross_entropy(config)), batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_tokens", [7, 1024])
def test_sums(variant: str, chunk_tokens: int) -> None:
    module, batch = module_and_batch(variant, chunk_tokens)
    output = module(batch)
    meta = json.loads((GOLDEN / variant / "meta.json").read_text())
    assert output.size.num_targets == meta["ntokens"]
    assert output.loss_sum.item() == pytest.approx(meta["loss"], rel=1e-6)
    assert output.metrics.sums["nll"].item() == pytest.approx(meta["nll_loss"], rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [7, 1024])
def test_gradients(chunk_tokens: int) -> None:
    module, batch = module_and_batch("ref/a_base", chunk_tokens)
    module(batch).loss_sum.backward()
    gradients = {name.removeprefix("model."): parameter.grad for name, parameter in module.named_parameters()}
    ours = {
        fairseq_name(name): gradient for name, gradient in split_parameters(parameter_layouts(module.model), gradients).items()
    }
    with np.load(GOLDEN / "ref/a_base/grads.npz") as file:
        theirs = {name: torch.from_numpy(file[name]) for name in file.files}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
