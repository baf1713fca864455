"""The objective: padding, empty micro-batches and splits change nothing; the sums are those of the plain formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.batch import IGNORE_INDEX, Batch, Sequences
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.factory import build_objective
from dstrain.objectives.train_module import TrainModule

NUM_TYPES, EOS, PAD = 37, 2, 1
SMOOTHING = 0.1


def train_module(*, norm_order: str = "post", chunk_tokens: int = 8, **parts) -> TrainModule:
    stack: dict[str, Any] = {"depth": 2, "num_heads": 2, "ffn_dim": 24}
    config = EncoderDecoderConfig(
        model_dim=16,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order=norm_order,
        embedding=PlainEmbedding(tie="all"),
        dropout=0.0,
        **parts,
    )
    model = build_model(config, VocabularySizes(source=NUM_TYPES, target=NUM_TYPES, pad_id=PAD, eos_id=EOS), seed=1)
    return TrainModule(model, build_objective(CrossEntropyConfig(label_smoothing=SMOOTHING, chunk_tokens=chunk_tokens)))


def padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def batch_of(sources: list[list[int]], targets: list[list[int]]) -> Batch:
    inputs = [[EOS, *target[:-1]] for target in targets]
    return Batch(
        source=Sequences(padded(sources, PAD), torch.tensor([len(row) for row in sources])),
        target=Sequences(padded(inputs, PAD), torch.tensor([len(row) for row in inputs])),
        labels=padded(targets, IGNORE_INDEX),
        num_targets=sum(map(len, targets)),
        example_ids=torch.arange(len(sources)),
    )


def pairs(*lengths: int) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(3)

    def words(length: int) -> list[int]:
        return [*torch.randint(4, NUM_TYPES, (length,), generator=generator).tolist(), EOS]

    return [words(length) for length in lengths], [words(length + 2) for length in reversed(lengths)]


def empty_batch() -> Batch:
    one = Sequences(torch.tensor([[EOS]]), torch.tensor([1]))
    return Batch(
        source=one,
        target=one,
        labels=torch.tensor([[IGNORE_INDEX]]),
        num_targets=0,
        example_ids=torch.empty(0, dtype=torch.int64),
    )


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_sums_are_those_of_the_plain_formula() -> None:
    module, batch = train_module(), batch_of(*pairs(5, 1, 9))
    output = module(batch)
    logits = module.model.project(module.model(batch.source, batch.target).hidden).flatten(0, 1)
    labels = batch.labels.flatten()
    smoothing = SMOOTHING * NUM_TYPES / (NUM_TYPES - 1)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="sum")
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert output.num_targets == 3 * 3 + 5 + 1 + 9
    torch.testing.assert_close(output.loss_sum, loss)
    torch.testing.assert_close(output.sums, {"nll": nll.detach()})
    assert not output.sums["nll"].requires_grad
    torch.testing.assert_close(gradients(module, output.loss_sum), gradients(module, loss), rtol=1e-4, atol=1e-5)


def test_one_batch_is_the_sum_of_its_parts() -> None:
    module, (sources, targets) = train_module(), pairs(5, 1, 9)
    whole = module(batch_of(sources, targets))
    parts = [module(batch_of([source], [target])) for source, target in zip(sources, targets, strict=True)]
    parts.append(module(empty_batch()))
    assert whole.num_targets == sum(part.num_targets for part in parts)
    total = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(whole.loss_sum, total)
    torch.testing.assert_close(whole.sums["nll"], torch.stack([part.sums["nll"] for part in parts]).sum())
    torch.testing.assert_close(gradients(module, whole.loss_sum), gradients(module, total), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", ["all", "none"])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_an_empty_micro_batch_gives_every_parameter_a_gradient_of_exactly_zero(norm_order, tie) -> None:
    module = train_module(norm_order=norm_order)
    if tie == "none":
        module.model.projection.weight = nn.Parameter(module.model.projection.weight.detach().clone())
    output = module(empty_batch())
    assert output.loss_sum.item() == 0.0
    assert output.sums["nll"].item() == 0.0
    output.loss_sum.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_the_size_of_the_chunks_moves_nothing() -> None:
    batch = batch_of(*pairs(5, 1, 9))
    small, large = train_module(chunk_tokens=1), train_module(chunk_tokens=4096)
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
