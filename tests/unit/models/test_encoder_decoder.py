"""What must hold of every encoder-decoder model: rows, later tokens, padding."""

import pytest
import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.models.config import EncoderDecoderConfig
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from tests.batches import collate
from tests.unit.models.build import VOCABULARY, name_of, sequences, small_config, small_model, variants

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def logits_of(model: EncoderDecoder, source: Sequences, target: Sequences) -> Tensor:
    with torch.no_grad():
        return model.project(model(source, target).hidden)


def rows(batch: Sequences, *chosen: int, width: int) -> Sequences:
    return Sequences(batch.tokens[list(chosen), :width], batch.lengths[list(chosen)])


@pytest.mark.parametrize("config", variants(), ids=name_of)
def test_padding_and_other_rows_do_not_change_a_row(config: EncoderDecoderConfig) -> None:
    model = small_model(config)
    source, target = sequences(9, 1, 5, seed=2), sequences(7, 3, 1, seed=3)
    together = logits_of(model, source, target)
    for row, (source_length, target_length) in enumerate(zip(source.lengths, target.lengths, strict=True)):
        alone = logits_of(model, rows(source, row, width=source_length), rows(target, row, width=target_length))
        torch.testing.assert_close(together[row, :target_length], alone[0], **CLOSE)


@pytest.mark.parametrize("config", variants()[::4], ids=name_of)
def test_later_tokens_do_not_change_earlier_ones(config: EncoderDecoderConfig) -> None:
    model = small_model(config)
    source, target = sequences(5, 4), sequences(8, 8)
    whole = logits_of(model, source, target)
    changed = target.tokens.clone()
    changed[:, 5:] = 7
    torch.testing.assert_close(logits_of(model, source, Sequences(changed, target.lengths))[:, :5], whole[:, :5], **CLOSE)
    assert not torch.allclose(logits_of(model, source, Sequences(changed, target.lengths))[:, 5:], whole[:, 5:])


def test_what_padding_holds_does_not_matter() -> None:
    model = small_model()
    source, target = sequences(9, 2), sequences(4, 6)
    other = source.tokens.clone()
    other[1, 2:] = 17
    torch.testing.assert_close(
        logits_of(model, Sequences(other, source.lengths), target), logits_of(model, source, target), **CLOSE
    )


def test_rows_of_padding_only_are_finite_and_harmless() -> None:
    model = small_model().train()
    source, target = sequences(4, 0), sequences(3, 1)
    hidden = model(source, target).hidden
    hidden[0].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_padding_gets_no_gradient() -> None:
    """Not in its own embedding, although nothing treats that row specially."""
    model = small_model()
    source, target = sequences(6, 2), sequences(5, 2)
    hidden = model(source, target).hidden
    loss = sum(hidden[row, :length].square().sum() for row, length in enumerate(target.lengths))
    loss.backward()
    for embedding in (model.source_embedding, model.target_embedding):
        assert embedding.tokens.weight.grad[VOCABULARY.pad_id].abs().max() == 0


def test_projection_in_and_out_of_reduce() -> None:
    model = small_model()
    hidden = torch.randn(6, 24)
    features, weight = model.reduce_projection(hidden, lambda features, weight, vocabulary: (features, weight))
    torch.testing.assert_close(features @ weight.T, model.project(hidden))
    assert model.project(hidden.view(2, 3, 24)).shape == (2, 3, VOCABULARY.target)


def test_a_source_is_needed() -> None:
    with pytest.raises(ValueError, match="needs a source"):
        small_model()(None, sequences(3))


def test_dropout_is_seeded_and_for_training_only() -> None:
    model = small_model(small_config(attention_dropout=0.1, activation_dropout=0.1))
    source, target = sequences(5, 3), sequences(4, 4)
    assert torch.equal(logits_of(model, source, target), logits_of(model, source, target))
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(logits_of(model, source, target))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_by_itself(field: str) -> None:
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    source, target = sequences(5, 3), sequences(4, 4)
    still = small_model(small_config(**silent)).train()
    assert torch.equal(logits_of(still, source, target), logits_of(still.eval(), source, target))
    noisy = small_model(small_config(**{**silent, field: 0.5})).train()
    assert not torch.allclose(logits_of(noisy, source, target), logits_of(still, source, target))


def test_bfloat16_runs_and_is_near() -> None:
    model = small_model()
    source, target = sequences(5, 3), sequences(4, 4)
    exact = logits_of(model, source, target)
    rough = logits_of(model.bfloat16(), source, target)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
def test_no_matrix_rounds_a_gradient_that_may_be_float32(tie: str) -> None:
    """In bf16, as under ZeRO-1; with both factors of a factorized table, used twice if tied."""
    config = small_config(embedding={"kind": "factorized", "dim": 12, "tie": tie, "activation": "gelu"})
    model = small_model(config).train().bfloat16()
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for parameter in matrices.values():
        parameter.grad_dtype = torch.float32
    batch = collate([([5, 6, 7, 8, 9, 2], [9, 8, 7, 2]), ([4, 2], [11, 12, 13, 14, 2])] * 20)
    build_cross_entropy(CrossEntropyConfig())(model, batch).loss_sum.backward()
    grads = {name: parameter.grad for name, parameter in matrices.items()}
    assert len(grads) > 10
    assert [name for name, grad in grads.items() if grad is None or bool((grad.bfloat16() == grad).all())] == []
