"""The objective: padding, empty micro-batches and splits change nothing; the sums are those of the plain formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.batch import Batch, ModelKind, Size
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from tests.batches import EOS, IGNORE_INDEX, PAD, collate, labels_of

VOCAB_SIZE = 37
SMOOTHING = 0.1


def train_module(*, norm_order: str = "post", chunk_tokens: int = 8, dropout: float = 0.0, **objective) -> TrainModule:
    stack: dict[str, Any] = {"depth": 2, "num_heads": 2, "ffn_dim": 24}
    config = EncoderDecoderConfig(
        model_dim=16,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order=norm_order,
        embedding=PlainEmbedding(tie="all"),
        dropout=dropout,
    )
    model = build_model(config, VocabularySizes(source=VOCAB_SIZE, target=VOCAB_SIZE, pad_id=PAD, eos_id=EOS), seed=1)
    options = {"label_smoothing": SMOOTHING, "chunk_tokens": chunk_tokens, **objective}
    return TrainModule(model, build_cross_entropy(CrossEntropyConfig(**options)))


def batch_of(sources: list[list[int]], targets: list[list[int]], kind: ModelKind = "encoder_decoder") -> Batch:
    return collate(list(zip(sources, targets, strict=True)), kind=kind)


def pairs(*lengths: int) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(3)

    def words(length: int) -> list[int]:
        return [*torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist(), EOS]

    return [words(length) for length in lengths], [words(length + 2) for length in reversed(lengths)]


def empty_batch(kind: ModelKind = "encoder_decoder") -> Batch:
    return collate([], kind=kind)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_sums_are_those_of_the_plain_formula() -> None:
    module, batch = train_module(), batch_of(*pairs(5, 1, 9))
    output = module(batch)
    logits = module.model.project(module.model(batch.source, batch.target).hidden).flatten(0, 1)
    labels = labels_of(batch).flatten()
    smoothing = SMOOTHING * VOCAB_SIZE / (VOCAB_SIZE - 1)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="sum")
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert output.size.num_targets == 3 * 3 + 5 + 1 + 9
    torch.testing.assert_close(output.loss_sum, loss)
    torch.testing.assert_close(output.metrics.sums, {"nll": nll.detach()})
    assert not output.metrics.sums["nll"].requires_grad
    torch.testing.assert_close(gradients(module, output.loss_sum), gradients(module, loss), rtol=1e-4, atol=1e-5)


def test_a_mean_over_sentences_is_that_of_each_sentences_mean() -> None:
    """Sentence by sentence, without padding, by torch's own mean over the tokens."""
    module, (sources, targets) = train_module(average="sentences"), pairs(5, 1, 9)
    output = module(batch_of(sources, targets))
    losses, nll = [], 0.0
    for source, target in zip(sources, targets, strict=True):
        batch = batch_of([source], [target])
        logits = module.model.project(module.model(batch.source, batch.target).hidden)[0]
        losses.append(F.cross_entropy(logits, labels_of(batch)[0], label_smoothing=SMOOTHING * VOCAB_SIZE / (VOCAB_SIZE - 1)))
        nll += F.cross_entropy(logits, labels_of(batch)[0], reduction="sum").item()
    denominator = module.objective.denominator(output.size)
    loss = torch.stack(losses).mean()
    assert denominator == 3
    torch.testing.assert_close(output.loss_sum / denominator, loss)
    assert output.metrics.sums["nll"].item() == pytest.approx(nll, rel=1e-5)
    assert set(output.metrics.sums) == {"nll"}
    found = gradients(module, output.loss_sum / denominator)
    torch.testing.assert_close(found, gradients(module, loss), rtol=1e-5, atol=1e-6)
    assert loss.item() != pytest.approx((train_module()(batch_of(sources, targets)).loss_sum / 24).item(), rel=1e-4)


@pytest.mark.parametrize(("average", "denominator"), [("tokens", 24), ("sentences", 3)])
def test_the_denominator_is_what_the_loss_is_a_mean_over(average, denominator) -> None:
    assert train_module(average=average).objective.denominator(Size(num_targets=24, num_sentences=3)) == denominator
    assert batch_of(*pairs(5, 1, 9)).size == Size(24, 3)
    assert empty_batch().size == Size(0, 0)


@pytest.mark.parametrize("average", ["tokens", "sentences"])
def test_one_batch_is_the_sum_of_its_parts(average) -> None:
    module, (sources, targets) = train_module(average=average), pairs(5, 1, 9)
    whole = module(batch_of(sources, targets))
    parts = [module(batch_of([source], [target])) for source, target in zip(sources, targets, strict=True)]
    parts.append(module(empty_batch()))
    assert whole.size.num_targets == sum(part.size.num_targets for part in parts)
    total = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(whole.loss_sum, total)
    torch.testing.assert_close(whole.metrics.sums["nll"], torch.stack([part.metrics.sums["nll"] for part in parts]).sum())
    torch.testing.assert_close(gradients(module, whole.loss_sum), gradients(module, total), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", ["all", "none"])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
@pytest.mark.parametrize("objective", [{}, {"average": "sentences"}, {"r_drop": {"alpha": 5.0}}])
def test_an_empty_micro_batch_gives_every_parameter_a_gradient_of_exactly_zero(norm_order, tie, objective) -> None:
    module = train_module(norm_order=norm_order, dropout=0.3, **objective)
    if tie == "none":
        module.model.projection.weight = nn.Parameter(module.model.projection.weight.detach().clone())
    output = module(empty_batch())
    assert output.loss_sum.item() == 0.0
    assert [value.item() for value in output.metrics.sums.values()] == [0.0] * len(output.metrics.sums)
    output.loss_sum.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("average", ["tokens", "sentences"])
def test_the_size_of_the_chunks_moves_nothing(average) -> None:
    batch = batch_of(*pairs(5, 1, 9))
    small, large = (train_module(chunk_tokens=number, average=average) for number in (1, 4096))
    one, other = small(batch), large(batch)
    torch.testing.assert_close(one.loss_sum, other.loss_sum)
    torch.testing.assert_close(gradients(small, one.loss_sum), gradients(large, other.loss_sum), rtol=1e-4, atol=1e-5)


def test_evaluation_has_no_graph_and_the_same_sums() -> None:
    module, batch = train_module(), batch_of(*pairs(5, 1, 9))
    trained = module(batch)
    with torch.no_grad():
        scored = module.eval()(batch)
    assert not scored.loss_sum.requires_grad
    torch.testing.assert_close(scored.loss_sum, trained.loss_sum.detach())


def test_parameters_are_the_models() -> None:
    module = train_module()
    assert {f"model.{name}" for name, _ in module.model.named_parameters()} == {name for name, _ in module.named_parameters()}
