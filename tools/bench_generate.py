"""Speed of beam search beside other programs on identical weights, in one process: sentences per CPU-second and the ratios.

Peers are Transformers' `generate` (Marian) and, if it is installed, CTranslate2 in float32. The model has the Transformer-Tiny
shape (4 + 4 post-norm layers, model 128, ffn 256, 4 heads, 7,792 tied entries) or another (`--shape`), with random weights, and
translates random sentences of 13 tokens and EOS with 5 beams. EOS is suppressed until the last of exactly 14 tokens, so all do
equal work. They take turns; each gets its best batch size, and its best round counts: other work on the machine can only add to
a round. Single sentences have rows of their own. malloc keeps freed memory for all, as in dstrain's verbs; this makes
Transformers about a tenth faster.

    OMP_NUM_THREADS=1 python tools/bench_generate.py [--sentences 256] [--rounds 5] [--shape 6x256x1024x4]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import transformers
from marian import marian_model
from transformers import GenerationConfig

from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from dstrain.interop.ctranslate2.model import SpecBuilder
from dstrain.models.config import (
    DecoderStackConfig,
    EncoderDecoderConfig,
    LengthLimits,
    PlainEmbedding,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.ops.allocator import keep_freed_memory

VOCAB_SIZE = 7792
BEAM_SIZE, SOURCE_TOKENS, NEW_TOKENS = 5, 14, 14
PAD, EOS, UNK = 1, 2, 3
POSITIONS = 64
BATCH_SIZES = (32, 64, 128)
Translate = Callable[[list[list[int]], int], list[list[int]]]


class Shape(NamedTuple):
    """layers: of each stack. heads: of attention."""

    layers: int
    model_dim: int
    ffn_dim: int
    heads: int


def parse_shape(text: str) -> Shape:
    """4x128x256x4 -> layers, model_dim, ffn_dim, heads"""
    return Shape(*map(int, text.split("x")))


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def random_model(shape: Shape) -> Model:
    """The model of all."""
    config = EncoderDecoderConfig(
        model_dim=shape.model_dim,
        encoder=StackConfig(depth=shape.layers, num_heads=shape.heads, ffn_dim=shape.ffn_dim),
        decoder=DecoderStackConfig(depth=shape.layers, num_heads=shape.heads, ffn_dim=shape.ffn_dim),
        embedding=PlainEmbedding(tie="all"),
        norm_order="post",
        max_source_length=POSITIONS,
        max_target_length=POSITIONS,
    )
    sizes = VocabularySizes(source=VOCAB_SIZE, target=VOCAB_SIZE, pad_id=PAD, eos_id=EOS)
    return build_model(config, sizes, seed=1).eval()


def dstrain_translator(model: Model) -> Translate:
    """dstrain's own generator, as the verbs use it."""

    def translate(sources: list[list[int]], batch_size: int) -> list[list[int]]:
        search = BeamSearchConfig(
            beam_size=BEAM_SIZE,
            min_length=NEW_TOKENS - 1,
            max_length_ratio=0,
            max_length_offset=NEW_TOKENS - 1,
            max_tokens=batch_size * BEAM_SIZE * SOURCE_TOKENS,
        )
        limits = LengthLimits(POSITIONS, POSITIONS, joint=False)
        generator = Generator(model, config=search, ids=SpecialIds(PAD, EOS, UNK), limits=limits)
        return [best.tokens for best, *_ in generator.translate_ids(sources)]

    return translate


def transformers_translator(ours: Model) -> Translate:
    """Marian."""
    model = marian_model(ours, positions=POSITIONS).eval()
    generation = GenerationConfig(
        num_beams=BEAM_SIZE,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=0,
        decoder_start_token_id=EOS,
    )

    def translate(sources: list[list[int]], batch_size: int) -> list[list[int]]:
        found = []
        for start in range(0, len(sources), batch_size):
            tokens = torch.tensor(sources[start : start + batch_size])
            found += model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=generation)[:, 1:].tolist()
        return found

    return translate


def ctranslate2_translator(ours: Model) -> Translate:
    """CTranslate2's own search."""
    import ctranslate2

    spec = SpecBuilder(ctranslate2.specs, ours.config, TensorSource(to_canonical(ours))).build()
    entries = [f"token{number}" for number in range(VOCAB_SIZE)]
    entries[PAD], entries[EOS], entries[UNK] = "<pad>", "</s>", "<unk>"
    spec.config.decoder_start_token = spec.config.eos_token = "</s>"
    spec.register_source_vocabulary(entries)
    spec.register_target_vocabulary(entries)
    spec.validate()
    spec.optimize(quantization=None)
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        model = ctranslate2.Translator(directory, device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    ids = {entry: number for number, entry in enumerate(entries)}

    def translate(sources: list[list[int]], batch_size: int) -> list[list[int]]:
        rows = [[entries[token] for token in source] for source in sources]
        options = {"min_decoding_length": NEW_TOKENS, "max_decoding_length": NEW_TOKENS, "length_penalty": 1.0}
        results = model.translate_batch(rows, beam_size=BEAM_SIZE, max_batch_size=batch_size, **options)
        return [[ids[entry] for entry in result.hypotheses[0]] for result in results]

    return translate


def rate(translate: Translate, sources: list[list[int]], batch_size: int) -> float:
    """Sentences per CPU-second."""
    start = cpu_seconds()
    found = translate(sources, batch_size)
    spent = cpu_seconds() - start
    assert [len(tokens) for tokens in found] == [NEW_TOKENS] * len(sources), "not exactly 14 tokens each"
    return len(sources) / spent


def main() -> None:
    """Measure alternately and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", type=parse_shape, default=Shape(4, 128, 256, 4), help="layers x model x ffn x heads")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit 1 below this ratio to Transformers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    body = torch.randint(4, VOCAB_SIZE, (args.sentences, SOURCE_TOKENS - 1), generator=generator).tolist()
    sources = [[*row, EOS] for row in body]
    model = random_model(args.shape)
    peers = {"transformers": transformers_translator(model), "dstrain": dstrain_translator(model)}
    if find_spec("ctranslate2") is not None:
        peers["ctranslate2"] = ctranslate2_translator(model)
    ratio = 0.0
    for sizes, part in ((BATCH_SIZES, sources), ((1,), sources[: max(1, args.sentences // 8)])):
        rates = measure(peers, part, sizes, args.rounds)
        for name, (size, values) in rates.items():
            own = f"{1000 / max(values):7.1f} CPU-ms a sentence" if size == 1 else f"{max(values):7.1f} sentences per CPU-second"
            beside = max(rates["dstrain"][1]) / max(values)
            print(
                f"batches of {size:<4} {name:<13} {own:<33} dstrain's ratio to it {beside:.2f}  (worst round {min(values):.1f}/s)"
            )
        ratio = ratio or max(rates["dstrain"][1]) / max(rates["transformers"][1])
    print(
        f"ratio to transformers {transformers.__version__} {ratio:.2f}  (beam {BEAM_SIZE}, {NEW_TOKENS} tokens, one thread, fp32)"
    )
    if ratio < args.at_least:
        sys.exit(f"below {args.at_least}")


def measure(
    peers: dict[str, Translate], sources: list[list[int]], sizes: tuple[int, ...], rounds: int
) -> dict[str, tuple[int, list[float]]]:
    """For each its best batch size, and its rates by round with that."""
    best = {}
    for name, translate in peers.items():
        translate(sources[:32], sizes[0])
        best[name] = sizes[0] if len(sizes) == 1 else max(sizes, key=lambda size: rate(translate, sources, size))
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, translate in peers.items():
            rates[name].append(rate(translate, sources, best[name]))
    return {name: (best[name], values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
