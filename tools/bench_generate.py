"""Speed of beam search beside Transformers' `generate`, in one process: sentences per CPU-second and the ratio.

Both models have the Transformer-Tiny shape (4 + 4 post-norm layers, model 128, ffn 256, 4 heads, 7,792 tied entries), random
weights and float32, and translate the same random sentences of 13 tokens and EOS with 5 beams. EOS is suppressed until the last
of exactly 14 tokens, so both do equal work. The two take turns; each gets its best batch size, and its median round counts.
malloc keeps freed memory for both, as it does in dstrain's verbs; this makes Transformers about a tenth faster.

    OMP_NUM_THREADS=1 python tools/bench_generate.py [--sentences 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections.abc import Callable

import torch
import transformers
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from dstrain.models.config import (
    DecoderStackConfig,
    EncoderDecoderConfig,
    LengthLimits,
    PlainEmbedding,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import build_model
from dstrain.ops.allocator import keep_freed_memory

VOCAB_SIZE, MODEL_DIM, FFN_DIM, LAYERS, HEADS = 7792, 128, 256, 4, 4
BEAM_SIZE, SOURCE_TOKENS, NEW_TOKENS = 5, 14, 14
PAD, EOS, UNK = 1, 2, 3
BATCH_SIZES = (32, 64, 128)
Translate = Callable[[list[list[int]], int], list[list[int]]]


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def dstrain_translator() -> Translate:
    """dstrain's own generator, as the verbs use it."""
    config = EncoderDecoderConfig(
        model_dim=MODEL_DIM,
        encoder=StackConfig(depth=LAYERS, num_heads=HEADS, ffn_dim=FFN_DIM),
        decoder=DecoderStackConfig(depth=LAYERS, num_heads=HEADS, ffn_dim=FFN_DIM),
        embedding=PlainEmbedding(tie="all"),
        norm_order="post",
    )
    sizes = VocabularySizes(source=VOCAB_SIZE, target=VOCAB_SIZE, pad_id=PAD, eos_id=EOS)
    model = build_model(config, sizes, seed=1).eval()

    def translate(sources: list[list[int]], batch_size: int) -> list[list[int]]:
        search = BeamSearchConfig(
            beam_size=BEAM_SIZE,
            min_length=NEW_TOKENS - 1,
            max_length_ratio=0,
            max_length_offset=NEW_TOKENS - 1,
            max_tokens=batch_size * BEAM_SIZE * SOURCE_TOKENS,
        )
        generator = Generator(model, config=search, ids=SpecialIds(PAD, EOS, UNK), limits=LengthLimits(64, 64, joint=False))
        return [best.tokens for best, *_ in generator.translate_ids(sources)]

    return translate


def transformers_translator() -> Translate:
    """Marian of the same shape."""
    config = MarianConfig(
        vocab_size=VOCAB_SIZE,
        d_model=MODEL_DIM,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN_DIM,
        decoder_ffn_dim=FFN_DIM,
        activation_function="relu",
        max_position_embeddings=64,
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=0,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )
    torch.manual_seed(1)
    model = MarianMTModel(config).eval()
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
    parser.add_argument("--at-least", type=float, default=0.0, help="exit 1 below this ratio")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    body = torch.randint(4, VOCAB_SIZE, (args.sentences, SOURCE_TOKENS - 1), generator=generator).tolist()
    sources = [[*row, EOS] for row in body]
    translators = {"transformers": transformers_translator(), "dstrain": dstrain_translator()}
    best = {}
    for name, translate in translators.items():
        translate(sources[:32], 32)
        best[name] = max(BATCH_SIZES, key=lambda size: rate(translate, sources, size))
    rates: dict[str, list[float]] = {name: [] for name in translators}
    for _ in range(args.rounds):
        for name, translate in translators.items():
            rates[name].append(rate(translate, sources, best[name]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    versions = {"transformers": f" {transformers.__version__}", "dstrain": ""}
    for name, median in medians.items():
        print(
            f"{name + versions[name]:<20} {median:7.1f} sentences per CPU-second  (batches of {best[name]}, "
            f"{min(rates[name]):.1f} to {max(rates[name]):.1f} in {args.rounds} rounds)"
        )
    ratio = medians["dstrain"] / medians["transformers"]
    print(f"{'ratio':<20} {ratio:7.2f}  (beam {BEAM_SIZE}, {NEW_TOKENS} tokens, one thread, float32)")
    if ratio < args.at_least:
        sys.exit(f"below {args.at_least}")


if __name__ == "__main__":
    main()
