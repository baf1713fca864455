"""Prepared data of a few grammar sentences, teachers for it, and stores that they dump."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dstrain.batch import Batch, ModelKind
from dstrain.data.batching.collate import Collator
from dstrain.data.config import DataConfig, GrammarText
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.distillation.store.dump import Dumper, DumpReport, plan_dump
from dstrain.distillation.store.manifest import Method, merge_store
from dstrain.distillation.store.store import LogitStore, open_store
from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import Model, build_model
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.storage.sharded_job import Worker

STACK = {"depth": 1, "num_heads": 2, "ffn_dim": 16}
MODEL = EncoderDecoderConfig.model_validate({"model_dim": 16, "encoder": STACK, "decoder": STACK})
PAD, EOS = 1, 2
COLLATOR = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS)


def prepared(directory: Path, *, num_pairs: int = 60, vocab_size: int = 120) -> Path:
    config = DataConfig(
        train=(GrammarText(split="train", num_pairs=num_pairs),),
        valid=(GrammarText(split="valid", num_pairs=7),),
        tokenizer=TrainedSentencePiece(vocab_size=vocab_size),
    )
    prepare(config, directory, workers=1, progress=False)
    return directory


def teacher_for(data: Path, seed: int = 3, sharpness: float = 1.0, eos_scale: float = 1.0) -> EncoderDecoder:
    """A random teacher whose logits are multiplied by `sharpness`, that of EOS by `eos_scale`: with 4 its outputs mostly end."""
    size = load_tokenizers(data / "tokenizer").target.vocab_size
    model = build_model(MODEL, VocabularySizes(source=size, target=size), seed=seed).eval()
    with torch.no_grad():
        model.projection.weight.mul_(sharpness)
        model.projection.weight[EOS].mul_(eos_scale)
    return model


def dumper(
    data: Path,
    output: Path,
    method: Method,
    *,
    teacher: Model,
    tokens_per_shard: int | None = None,
    max_tokens: int = 200,
    split: str = "train",
) -> Dumper:
    dataset, manifest = open_dataset(data, split), load_manifest(data)
    job = plan_dump(
        method, dataset, manifest, split, "some teacher", vocabulary=teacher.vocabulary, tokens_per_shard=tokens_per_shard
    )
    return Dumper(teacher, dataset, job, output, teacher.vocabulary, "cpu", max_tokens, chunk_tokens=17)


WHOLE = Worker(0, 1)


def dump(work: Dumper, share: Worker = WHOLE) -> DumpReport:
    return work.run(share, lambda tokens: None)


def stored(
    data: Path,
    output: Path,
    method: Method,
    *,
    teacher: Model,
    tokens_per_shard: int | None = None,
    renormalize: bool = False,
) -> LogitStore:
    """A complete store, opened."""
    dump(dumper(data, output, method, teacher=teacher, tokens_per_shard=tokens_per_shard))
    merge_store(output, "a test")
    return open_store(output, data=data, manifest=load_manifest(data), renormalize=renormalize)


def batch_of(dataset: Dataset, rows: Sequence[int], kind: ModelKind = "encoder_decoder") -> Batch:
    return Collator(kind, pad_id=PAD, eos_id=EOS)([dataset[row] for row in rows], np.array(rows))


@torch.no_grad()
def teacher_probs(teacher: Model, dataset: Dataset, rows: Sequence[int], temperature: float = 1.0) -> Tensor:
    """The plain way: one sentence at a time, all probabilities of its tokens; (n, V) in the order of rows and positions."""
    found = []
    for row in rows:
        batch = batch_of(dataset, [row], teacher.kind)
        found.append(torch.softmax(teacher.project(target_hidden(teacher, batch)) / temperature, -1))
    return torch.cat(found)
