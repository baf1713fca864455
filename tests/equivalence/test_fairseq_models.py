"""Imported models compute what the predecessor computed: logits, loss and gradients of its own runs (golden/)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject, merged
from dstrain.batch import Sequences
from dstrain.interop.fairseq.checkpoint import read_fairseq_checkpoint
from dstrain.interop.fairseq.lora import convert_adapted
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import Projections, build_model
from dstrain.models.weights import TensorSource, load_canonical, parameter_layouts, split_parameters
from dstrain.nn.attention_bias import AttentionBias
from dstrain.nn.rotary import LengthRotary
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden

ENCODER_DECODERS = [
    "ref/a_base",
    "ref/b_prenorm_learned_lnemb",
    "ref/b_prenorm_sinusoidal",
    "ref/c_share_all",
    "ref/c_share_dec_inout",
    "ref/d_recurrent3",
    "ref/e_factorized16_gelu",
    "ref/e_factorized16_linear",
    "ref/f_outact_gelu",
    "ref/g_rope_linear2",
    "ref/g_rope_vanilla",
    "ref/h_yarn_dynamic",
    "ref/h_yarn_scale8",
    "ref/i_alibi_sym",
    "ref/i_nopos_reference",
    "ref/j_lora_r4",
    "late/l_alibi_sym",
    "late/l_base",
    "late/l_factorized16",
    "late/l_fast_fused",
    "late/l_glu_silu",
    "late/l_gqa",
    "late/l_rmsnorm",
    "late/l_rope_fast",
]
LANGUAGE_MODELS = ["ref/k_lm_plain", "ref/k_lm_plain_tied_prenorm"]
GRADIENTS = [
    ("ref/a_base", "fused"),
    ("ref/a_base", "separate"),
    ("ref/d_recurrent3", "fused"),
    ("ref/d_recurrent3", "separate"),
    ("ref/e_factorized16_gelu", "fused"),
    ("ref/j_lora_r4", "separate"),
    ("ref/k_lm_plain", "fused"),
]
"""Folders that hold gradients, those of a language model of plain cross-entropy. Adapters need projections of their own."""
ELSEWHERE = {"ref/beam", "ref/kd", "ref/toy_train", "ref/trace"}
"""Folders that other test files are about: search, distillation, a trained model's output, updates."""
WRONG_INCREMENTALLY = {"ref/d_recurrent3", "ref/g_rope_linear2", "ref/g_rope_vanilla", "ref/h_yarn_dynamic", "ref/h_yarn_scale8"}
WRONG_INCREMENTALLY |= {"ref/i_alibi_sym", "late/l_alibi_sym"}
"""Where the predecessor's own step-by-step decoding is another function than its training, or fails."""
LENGTH_OF_THE_BATCH = {"ref/h_yarn_dynamic"}
"""Where scaling follows the padded width of the batch; here it follows each sentence's own length, which is tested elsewhere."""
PAD = 1
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
FAIRSEQ_PARTS = {
    "source_embedding.tokens": "encoder.embed_tokens",
    "target_embedding.tokens": "decoder.embed_tokens",
    "embed_tokens.table": "embed_tokens.emb",
    "embed_tokens.up_proj": "embed_tokens.up",
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
    """The model of a folder; its adapters, if any, are merged, or parts of a model with separate projections."""
    checkpoint = read_fairseq_checkpoint(GOLDEN / variant / "checkpoint.pt")
    config, vocabulary, weights, adapter = convert_adapted(checkpoint, unmerged=False)
    model = build_model(config, vocabulary, projections=projections, seed=None).eval()
    if adapter is not None:
        lora = LoraConfig(**adapter.settings)
        if projections == "separate":
            inject(model, lora, TensorSource(weights), seed=1)
            freeze(model, lora)
            weights |= adapter.weights
        else:
            weights = {name: merged(name, tensor, adapter.weights, lora) for name, tensor in weights.items()}
    load_canonical(model, TensorSource(weights))
    golden = arrays(variant)
    if variant in LENGTH_OF_THE_BATCH:
        follow_width(model.source_attention_bias, golden["src_tokens"].shape[1])
        follow_width(model.target_attention_bias, golden["prev_output_tokens"].shape[1])
    return model


def follow_width(view: AttentionBias, width: int) -> None:
    """Take every sequence to be as long as the batch is wide, as the predecessor does."""
    assert isinstance(view.rotary, LengthRotary)
    frequencies = view.rotary.rotary_frequencies
    view.rotary.rotary_frequencies = lambda lengths: frequencies(torch.full_like(lengths, width))


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
@pytest.mark.parametrize("variant", ENCODER_DECODERS)
def test_logits(variant: str, projections: Projections) -> None:
    golden = arrays(variant)
    model = imported(variant, projections)
    source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
    assert torch.equal(source.tokens, moved_right(golden["src_tokens"]))
    with torch.no_grad():
        logits = model.project(model(source, target).hidden)
    real = target.tokens != PAD
    for name in ("logits", "logits_rightpad"):
        torch.testing.assert_close(logits[real], golden[name][real], **CLOSE)


@pytest.mark.parametrize("variant", ENCODER_DECODERS)
def test_encoder_output(variant: str) -> None:
    golden = arrays(variant)
    source = right_padded(golden["src_tokens_rightpad"])
    with torch.no_grad():
        memory = imported(variant).encode(source)
    left_padded = golden["encoder_out"].transpose(0, 1)  # (T, B, D) -> (B, T, D)
    for row, length in enumerate(source.lengths.tolist()):
        torch.testing.assert_close(memory.hidden[row, :length], left_padded[row, -length:], **CLOSE)


@pytest.mark.parametrize("variant", ENCODER_DECODERS)
def test_incremental_decoding(variant: str) -> None:
    """The truth is the teacher-forced logits; the predecessor's own step-by-step ones too, where they are right."""
    golden = arrays(variant)
    model = imported(variant)
    tokens = golden["prev_output_tokens"]
    state = model.start(
        right_padded(golden["src_tokens_rightpad"]), num_sentences=5, rows_per_sentence=1, max_length=tokens.shape[1]
    )
    logits = torch.cat([model.step(tokens[:, t : t + 1], state) for t in range(tokens.shape[1])], dim=1)
    real = tokens != PAD
    torch.testing.assert_close(logits[real], golden["logits"][real], **CLOSE)
    if variant not in WRONG_INCREMENTALLY:
        torch.testing.assert_close(logits[real], golden["logits_incremental"][real], **CLOSE)


@pytest.mark.parametrize("variant", LANGUAGE_MODELS)
def test_language_models(variant: str) -> None:
    golden = arrays(variant)
    model = imported(variant)
    tokens = golden["src_tokens"]
    with torch.no_grad():
        logits = model.project(model(None, right_padded(tokens)).hidden)
    real = tokens != PAD
    torch.testing.assert_close(logits[real], golden["logits"][real], **CLOSE)
    state = model.start(None, num_sentences=len(tokens), rows_per_sentence=1, max_length=tokens.shape[1])
    steps = torch.cat([model.step(tokens[:, t : t + 1], state) for t in range(tokens.shape[1])], dim=1)
    torch.testing.assert_close(steps[real], golden["logits"][real], **CLOSE)


def test_no_folder_is_left_out() -> None:
    folders = {f"{generation}/{path.name}" for generation in ("ref", "late") for path in (GOLDEN / generation).iterdir()}
    assert folders == {*ENCODER_DECODERS, *LANGUAGE_MODELS, *ELSEWHERE}


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


def test_every_folder_with_gradients_is_compared() -> None:
    folders = {str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/grads.npz")}
    assert folders == {variant for variant, _ in GRADIENTS}


@pytest.mark.parametrize(("variant", "projections"), GRADIENTS)
def test_loss_and_gradients(variant: str, projections: Projections) -> None:
    """Ours in float64: what float32 sums to depends on the processor. Theirs are rounded by sums of many terms, so what may
    differ is a share of a gradient's largest number."""
    folder: Path = GOLDEN / variant
    golden = arrays(variant)
    model = imported(variant, projections).double()
    if variant in LANGUAGE_MODELS:
        source, target, smoothing = None, right_padded(golden["src_tokens"]), 0.0
    else:
        source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
        smoothing = 0.1
    loss = label_smoothed_loss(model.project(model(source, target).hidden), golden["target"], smoothing)
    loss.backward()
    assert loss.item() == pytest.approx(json.loads((folder / "meta.json").read_text())["loss"], rel=1e-6)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    layout = {name: parts for name, parts in parameter_layouts(model).items() if name in gradients}
    ours = {fairseq_name(name): gradient for name, gradient in split_parameters(layout, gradients).items()}
    with np.load(folder / "grads.npz") as file:
        theirs = {
            name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): torch.from_numpy(file[name]) for name in file.files
        }
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        most = CLOSE["atol"] + CLOSE["rtol"] * float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient.double(), rtol=0, atol=most)


@pytest.mark.parametrize(("name", "unmerged"), [("checkpoint.pt", False), ("checkpoint_unmerged.pt", True)])
def test_the_base_below_an_adapter(name: str, unmerged: bool) -> None:
    folder, golden = GOLDEN / "ref" / "j_lora_r4", arrays("ref/j_lora_r4")
    expected = convert_adapted(read_fairseq_checkpoint(folder / "base_without_lora.pt"), unmerged=False)
    config, vocabulary, weights, adapter = convert_adapted(read_fairseq_checkpoint(folder / name), unmerged=unmerged)
    assert adapter is not None
    assert adapter.settings["targets"] == ["k_proj", "v_proj"]
    assert (config, vocabulary, None) == (*expected[:2], expected[3])
    torch.testing.assert_close(weights, expected[2], rtol=1e-5, atol=1e-6)
    lora = LoraConfig(**adapter.settings)
    adapted = {name: merged(name, tensor, adapter.weights, lora) for name, tensor in weights.items()}
    source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
    model = build_model(config, vocabulary, seed=None).eval()
    for state, truth in ((weights, "logits_base_without_lora"), (adapted, "logits_unmerged")):
        load_canonical(model, TensorSource(state))
        with torch.no_grad():
            logits = model.project(model(source, target).hidden)
        real = target.tokens != PAD
        torch.testing.assert_close(logits[real], golden[truth][real], **CLOSE)
