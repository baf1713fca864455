"""What a capture shows: the hidden states between the passes, and the very probabilities by which attention mixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.model_output import ActivationCapture, Tap
from dstrain.models.config import DecoderStackConfig, StackConfig
from dstrain.nn import attention_bias
from dstrain.ops.attention import attention
from tests.batches import EOS, collate, decoder_hidden
from tests.unit.models.build import random_config, sequences, small_config, small_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EVERYTHING = [
    Tap(kind, side, layer)
    for kind in ("hidden_states", "attention")
    for side in ("encoder", "decoder", "cross")
    for layer in range(5)
]


def heard(model: Any, source: Any, target: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Probabilities of every call of attention, in order, (B, H, T, S): what it gives where the values are the keys' numbers."""
    calls: list[Tensor] = []

    def listening(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        numbers = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        calls.append(attention(query, key, numbers, **how))
        return attention(query, key, value, **how)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention_bias, "attention", listening)
        decoder_hidden(model, source, target)
    return calls


@pytest.mark.parametrize("seed", range(16))
def test_attention_is_shown_as_the_model_mixes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of all parts: rotary positions with every scaling, ALiBi, grouped heads, stacking, both kinds of model."""
    config = random_config(seed)
    model = small_model(config)
    source, target = sequences(9, 1, 5, seed=2), sequences(7, 3, 1, seed=3)
    capture = ActivationCapture(EVERYTHING)
    with torch.no_grad():
        captured = decoder_hidden(model, source, target, capture)
        assert torch.equal(captured, decoder_hidden(model, source, target))
    calls = iter([probabilities.mean(1) for probabilities in heard(model, source, target, monkeypatch)])
    if config.kind == "encoder_decoder":
        sides = [("encoder", layer) for layer in range(1, config.encoder.depth + 1)]
        sides += [(side, layer) for layer in range(1, config.decoder.depth + 1) for side in ("decoder", "cross")]
        expected = {Tap("attention", side, layer): next(calls) for side, layer in sides}
    else:
        expected = {Tap("attention", "decoder", layer): next(calls) for layer in range(1, config.decoder.depth + 1)}
    assert next(calls, None) is None
    found = {tap: value for tap, value in capture.captured.items() if tap.kind == "attention"}
    assert found.keys() == expected.keys()
    for tap, value in expected.items():
        torch.testing.assert_close(found[tap], value, **CLOSE)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_hidden_states_are_those_between_the_passes(order: str) -> None:
    config = small_config(
        norm_order=order,
        encoder=StackConfig(depth=4, unique_layers=2, num_heads=3, ffn_dim=40),
        decoder=DecoderStackConfig(depth=3, unique_layers=2, num_heads=4, ffn_dim=56),
    )
    model, capture = small_model(config), ActivationCapture(EVERYTHING)
    source, target = sequences(9, 1, 5, seed=2), sequences(7, 3, 1, seed=3)
    passed: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        first = model.source_embedding if side == "encoder" else model.target_embedding
        for module in (first, *stack.layers):
            module.register_forward_hook(lambda _, __, output, side=side: passed[side].append(output))
    output = model(source, target, capture)
    passed["encoder"][-1], passed["decoder"][-1] = output.memory.hidden, output.hidden
    found = {tap: value for tap, value in capture.captured.items() if tap.kind == "hidden_states"}
    assert len(found) == len(passed["encoder"]) + len(passed["decoder"]) == 9, "passes, not stored layers"
    for tap, value in found.items():
        assert torch.equal(value, passed[tap.side][tap.layer])
    last = found[Tap("hidden_states", "decoder", 3)]
    assert torch.equal(last, model.decoder.final_norm(last)) == (order == "post")


def test_activations_of_a_decoder_only_model_are_those_of_the_concatenated_sequence() -> None:
    seed = next(seed for seed in range(50) if random_config(seed).kind == "decoder_only")
    config = random_config(seed)
    model, capture = small_model(config), ActivationCapture(EVERYTHING)
    batch = collate([([5, 6, 7, EOS], [8, EOS]), ([EOS], [9, 5, 6, EOS])], kind="decoder_only")
    output = model(None, batch.target, capture)
    assert torch.equal(capture.captured[Tap("hidden_states", "decoder", config.decoder.depth)], output.hidden)
    for row, length in enumerate(batch.target.lengths.tolist()):
        alone = ActivationCapture(EVERYTHING)
        model(None, Sequences(batch.target.tokens[row : row + 1, :length], batch.target.lengths[row : row + 1]), alone)
        for tap, value in alone.captured.items():
            together = capture.captured[tap][row : row + 1, :length]
            torch.testing.assert_close(together[..., : value.shape[2]], value, **CLOSE)


def test_a_skipped_pass_shows_its_input() -> None:
    config = small_config(encoder=StackConfig(depth=3, num_heads=3, ffn_dim=40, layer_drop=0.999), norm_order="post")
    model, capture = small_model(config).train(), ActivationCapture(EVERYTHING)
    model.encode(sequences(9, 1, 5), capture)
    states = [capture.captured[Tap("hidden_states", "encoder", layer)] for layer in range(4)]
    assert all(torch.equal(state, states[0]) for state in states)
    assert Tap("attention", "encoder", 3) in capture.captured


def test_only_the_requested_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = small_model(), []
    real = attention_bias.mean_probabilities
    monkeypatch.setattr(attention_bias, "mean_probabilities", lambda *args, **how: calls.append(1) or real(*args, **how))
    source, target = sequences(9, 1, 5), sequences(7, 3, 1)
    model(source, target)
    model(source, target, ActivationCapture([Tap("hidden_states", "encoder", 1)]))
    assert not calls
    capture = ActivationCapture([Tap("attention", "cross", 2), Tap("hidden_states", "decoder", 0)])
    model(source, target, capture)
    assert len(calls) == 1
    assert capture.captured.keys() == capture.requested
    assert all(value.requires_grad for value in capture.captured.values())
