"""Imported models compute what the predecessor computed: logits, loss and gradients of its own runs (golden/)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import Projections, build_model
from dstrain.models.interop.fairseq import convert, read_fairseq_checkpoint
from dstrain.models.portable import load_portable, portable_layout, split
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden

BASELINES = [
    "ref/a_base",
    "ref/b_prenorm_learned_lnemb",
    "ref/b_prenorm_sinusoidal",
    "ref/c_share_all",
    "ref/c_share_dec_inout",
    "ref/i_nopos_reference",
    "late/l_base",
    "late/l_fast_fused",
]
PAD = 1
FAIRSEQ_PARTS = {
    "source_embedding.tokens": "encoder.embed_tokens",
    "target_embedding.tokens": "decoder.embed_tokens",
    "projection": "decoder.output_projection",
    "self_attention_norm": "self_attn_layer_norm",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "self_attention": "self_attn",
    "cross_attention": "encoder_attn",
    "feed_forward.up_proj": "fc1",
    "feed_forward.down_proj": "fc2",
    "feed_forward_norm": "final_layer_norm",
}
"""Written down here once more, so that a mistake in the reader's own table shows."""


def imported(variant: str, projections: Projections = "fused") -> EncoderDecoder:
    config, vocabulary, weights = convert(read_fairseq_checkpoint(GOLDEN / variant / "checkpoint.pt"))
    model = build_model(config, vocabulary, projections=projections, seed=None).eval()
    load_portable(model, weights)
    return model


def arrays(variant: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / variant / "io.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def right_padded(tokens: Tensor) -> Sequences:
    return Sequences(tokens, (tokens != PAD).sum(1))


def moved_right(left_padded: Tensor) -> Tensor:
    """The same rows with their padding on the right."""
    rows = [row[row != PAD] for row in left_padded]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


@pytest.mark.parametrize("projections", ["fused", "separate"])
@pytest.mark.parametrize("variant", BASELINES)
def test_logits(variant: str, projections: Projections) -> None:
    golden = arrays(variant)
    model = imported(variant, projections)
    source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
    assert torch.equal(source.tokens, moved_right(golden["src_tokens"]))
    with torch.no_grad():
        logits = model.project(model(source, target).hidden)
    real = target.tokens != PAD
    for name in ("logits", "logits_rightpad"):
        torch.testing.assert_close(logits[real], golden[name][real], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("variant", BASELINES)
def test_encoder_output(variant: str) -> None:
    golden = arrays(variant)
    source = right_padded(golden["src_tokens_rightpad"])
    with torch.no_grad():
        memory = imported(variant).encode(source)
    left_padded = golden["encoder_out"].transpose(0, 1)  # (T, B, D) -> (B, T, D)
    for row, length in enumerate(source.lengths.tolist()):
        torch.testing.assert_close(memory.hidden[row, :length], left_padded[row, -length:], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("variant", BASELINES)
def test_incremental_decoding(variant: str) -> None:
    """The predecessor's own step-by-step logits, which are right for these variants."""
    golden = arrays(variant)
    model = imported(variant)
    tokens = golden["prev_output_tokens"]
    state = model.start(
        right_padded(golden["src_tokens_rightpad"]), num_sentences=5, rows_per_sentence=1, max_length=tokens.shape[1]
    )
    logits = torch.cat([model.step(tokens[:, t : t + 1], state) for t in range(tokens.shape[1])], dim=1)
    real = tokens != PAD
    torch.testing.assert_close(logits[real], golden["logits_incremental"][real], rtol=1e-5, atol=2e-6)


def label_smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(1 - e - e') nll + e' smooth, e' = e / (V - 1), summed over real tokens."""
    log_probs = logits[labels != PAD].log_softmax(-1)
    nll = -log_probs.gather(1, labels[labels != PAD][:, None]).sum()
    spread = smoothing / (logits.shape[-1] - 1)
    return (1 - smoothing - spread) * nll - spread * log_probs.sum()


def fairseq_name(name: str) -> str:
    for ours, theirs in FAIRSEQ_PARTS.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("projections", ["fused", "separate"])
def test_loss_and_gradients(projections: Projections) -> None:
    folder: Path = GOLDEN / "ref/a_base"
    golden = arrays("ref/a_base")
    model = imported("ref/a_base", projections)
    source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
    loss = label_smoothed_loss(model.project(model(source, target).hidden), golden["target"], 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(json.loads((folder / "meta.json").read_text())["loss"], rel=1e-6)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    ours = {fairseq_name(name): gradient for name, gradient in split(portable_layout(model), gradients).items()}
    with np.load(folder / "grads.npz") as file:
        theirs = {name: torch.from_numpy(file[name]) for name in file.files}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
