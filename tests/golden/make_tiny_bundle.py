"""Made `tiny_bundle` once: a model that has learned twelve sentences by heart, and what it answered then.

The bundle is a promise to readers of later versions, so it is never made again: a change that breaks its test breaks users'
bundles. This file says how it came about.
"""

import json
from pathlib import Path
from typing import Any

import torch

from dstrain.batch import Sequences
from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical

HERE = Path(__file__).parent
BUNDLE = HERE / "tiny_bundle"
PAIRS = [
    ("the dog sees the cat", "der Hund sieht die Katze"),
    ("the cat sees the dog", "die Katze sieht den Hund"),
    ("the child sees the dog", "das Kind sieht den Hund"),
    ("the dog sees the child", "der Hund sieht das Kind"),
    ("the cat sleeps", "die Katze schläft"),
    ("the dog sleeps", "der Hund schläft"),
    ("the child sleeps today", "das Kind schläft heute"),
    ("the woman sees the house", "die Frau sieht das Haus"),
    ("the man sees the house", "der Mann sieht das Haus"),
    ("the woman sees the man today", "die Frau sieht heute den Mann"),
    ("the house is old", "das Haus ist alt"),
    ("the man is old today", "der Mann ist heute alt"),
]


def tokenizer(texts: list[str]) -> DictionaryTokenizer:
    words = sorted({word for text in texts for word in text.split()})
    return DictionaryTokenizer("".join(f"{word} 1\n" for word in words).encode())


def padded(rows: list[list[int]], pad: int) -> Sequences:
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    return Sequences(tokens, torch.tensor([len(row) for row in rows]))


def main() -> None:
    sides = [list(side) for side in zip(*PAIRS, strict=True)]
    pair = TokenizerPair(tokenizer(sides[0]), tokenizer(sides[1]))
    stack: dict[str, Any] = {"depth": 1, "num_heads": 2, "ffn_dim": 32}
    config = EncoderDecoderConfig(
        model_dim=24,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order="pre",
        dropout=0.0,
        embedding=PlainEmbedding(tie="decoder"),
        max_source_length=64,
        max_target_length=64,
    )
    vocabulary = VocabularySizes(source=pair.source.vocab_size, target=pair.target.vocab_size)
    model = build_model(config, vocabulary, seed=1)
    source = padded([[*ids, 2] for ids in pair.source.encode(sides[0])], 1)
    target = padded([[2, *ids] for ids in pair.target.encode(sides[1])], 1)
    labels = padded([[*ids, 2] for ids in pair.target.encode(sides[1])], -100).tokens
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(model.project(model(source, target).hidden).transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_bundle(
        BUNDLE,
        model_config=config,
        vocabulary=vocabulary,
        weights=to_canonical(model),
        tokenizers=pair,
        recipe=None,
        notes={"made_by": "tests/golden/make_tiny_bundle.py"},
    )
    model = load_bundle(BUNDLE).model
    with torch.no_grad():
        logits = model.project(model(source, target).hidden)
    expected = {
        "source": sides[0],
        "translations": sides[1],
        "source_ids": [row[:length] for row, length in zip(source.tokens.tolist(), source.lengths.tolist(), strict=True)],
        "first_logits": [[round(value, 5) for value in row] for row in logits[:2, 0].tolist()],
    }
    (HERE / "tiny_bundle.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print("loss", loss.item())


if __name__ == "__main__":
    main()
