"""R-Drop as an objective: the passes are two of the model's own, training has two, evaluation one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.batch import Batch
from dstrain.nn.dropout import mask_pass, seed_masks
from tests.batches import IGNORE_INDEX, labels_of
from tests.unit.objectives.test_cross_entropy import SMOOTHING, VOCAB_SIZE, batch_of, gradients, pairs, train_module

ALPHA = 3.0


def written_out(module, batch: Batch, average: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nll and kl by all logits of two passes and autograd, sentence by sentence."""
    logits = []  # (B, T, V) each
    for number in range(2):
        with mask_pass(number):
            logits.append(module.model.project(module.model(batch.source, batch.target).hidden))
    loss, nll, kl = torch.zeros(()), torch.zeros(()), torch.zeros(())
    smoothing = SMOOTHING * VOCAB_SIZE / (VOCAB_SIZE - 1)
    for row, labels in enumerate(labels_of(batch)):
        length = int((labels != IGNORE_INDEX).sum())
        first, second = (F.log_softmax(each[row, :length], dim=-1) for each in logits)
        hard = sum(
            F.cross_entropy(each[row, :length], labels[:length], label_smoothing=smoothing, reduction="sum") for each in logits
        )
        apart = (first.exp() * (first - second)).sum() + (second.exp() * (second - first)).sum()
        loss = loss + (hard / 2 + ALPHA * apart / 4) / (length if average == "sentences" else 1)
        nll = nll - (first + second).gather(1, labels[:length, None]).sum() / 2
        kl = kl + apart / 2
    return loss, nll, kl


@pytest.mark.parametrize("average", ["tokens", "sentences"])
def test_equals_two_written_out_passes_with_the_same_dropout(average) -> None:
    module = train_module(dropout=0.3, average=average, r_drop={"alpha": ALPHA})
    batch = batch_of(*pairs(5, 1, 9))
    seed_masks(7, 0)
    output = module(batch)
    loss, nll, kl = written_out(module, batch, average)
    assert kl > 0.1
    torch.testing.assert_close(output.loss_sum, loss)
    torch.testing.assert_close(output.metrics.sums, {"nll": nll, "kl": kl}, rtol=1e-5, atol=1e-5)
    assert not any(value.requires_grad for value in output.metrics.sums.values())
    assert module.objective.denominator(output.size) == (3 if average == "sentences" else 24)
    found, expected = (gradients(module, total) for total in (output.loss_sum, loss))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_dropout_the_divergence_is_exactly_zero_and_the_loss_plain() -> None:
    batch = batch_of(*pairs(5, 1, 9, 33))
    module, plain = train_module(r_drop={"alpha": ALPHA}), train_module()
    output, expected = module(batch), plain(batch)
    assert output.metrics.sums["kl"].item() == 0.0
    torch.testing.assert_close(output.loss_sum, expected.loss_sum)
    torch.testing.assert_close(gradients(module, output.loss_sum), gradients(plain, expected.loss_sum), rtol=1e-4, atol=1e-5)


def test_evaluation_is_a_single_pass_of_plain_cross_entropy() -> None:
    batch = batch_of(*pairs(5, 1, 9))
    module = train_module(dropout=0.3, r_drop={"alpha": ALPHA}).eval()
    calls = []
    module.model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        output = module(batch)
        expected = train_module(dropout=0.3).eval()(batch)
    assert len(calls) == 1
    assert set(output.metrics.sums) == {"nll"}
    assert torch.equal(output.loss_sum, expected.loss_sum)
