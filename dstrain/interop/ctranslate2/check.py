"""Whether an exported model scores random tokens in CTranslate2 as the bundle does here, whichever version is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.checkpoint.bundle import StoredBundle
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.scoring import score_targets
from dstrain.interop.ctranslate2.vocabulary import entry_names, same_end
from dstrain.models.factory import build_model
from dstrain.models.weights import load_canonical
from dstrain.protocols import TextTokenizer
from dstrain.seeding import derive_seed

RANDOM_LENGTHS = (1, 3, 9)
"""Tokens of the random sequences before their ends."""


def largest_difference(
    ctranslate2: Any, directory: Path, stored: StoredBundle, tokenizers: TokenizerPair, starts: Mapping[str, str]
) -> float:
    """Of a token's log-probability, in nats, on the CPU. directory: the exported model. Both models are in memory.

    starts: what the decoder reads first by direction, see `start_names`; the first one is tried.
    """
    config, source, target = stored.description.model, tokenizers.source, tokenizers.target
    reads_source, limits = config.kind == "encoder_decoder", config.limits
    targets = _random_rows(target, limits.target - 1)
    sources = _random_rows(source, limits.source) if reads_source else [[source.eos_id]] * len(targets)
    model = build_model(config, stored.description.vocabulary, seed=None)
    load_canonical(model, stored)
    names = entry_names(target, "target")
    start = names.index(next(iter(starts.values()))) if starts else target.start_id
    ids = SpecialIds.of(target, start=start)
    scored = score_targets(model.float().eval(), sources, targets, config=BeamSearchConfig(), ids=ids)
    del model
    ours = [hypothesis.token_scores for hypothesis in scored]
    begin = [names[start]] if starts or not reads_source else []
    texts = [[*begin, *(names[number] for number in row)] for row in targets]
    theirs = _their_scores(ctranslate2, directory, tokenizers, sources if reads_source else None, texts)
    return max(abs(a - b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))


def _random_rows(tokenizer: TextTokenizer, longest: int) -> list[list[int]]:
    """Ids of random entries, and the end. A model has no padding among the tokens it reads."""
    rng = np.random.default_rng(derive_seed(1, "exported model"))
    entries = [number for number in range(tokenizer.vocab_size) if number not in (tokenizer.pad_id, tokenizer.eos_id)]
    lengths = [min(length, longest - 1) for length in RANDOM_LENGTHS]
    return [[*rng.choice(entries, length).tolist(), tokenizer.eos_id] for length in lengths]


def _their_scores(
    ctranslate2: Any,
    directory: Path,
    tokenizers: TokenizerPair,
    sources: Sequence[Sequence[int]] | None,
    texts: Sequence[Sequence[str]],
) -> list[list[float]]:
    """sources: None for a decoder-only model. texts: targets, which end in EOS. CTranslate2 adds ends and starts itself, where
    `config.json` says so."""
    if sources is None:
        results = ctranslate2.Generator(str(directory), device="cpu").score_batch(list(map(list, texts)))
    else:
        source_names = entry_names(tokenizers.source, "source")
        model = ctranslate2.Translator(str(directory), device="cpu")
        read = [[source_names[number] for number in (row[:-1] if same_end(tokenizers) else row)] for row in sources]
        results = model.score_batch(read, [list(text[:-1]) for text in texts])
    return [result.log_probs for result in results]
