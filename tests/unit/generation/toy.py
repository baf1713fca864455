"""A model small enough to enumerate: a recurrent cell whose state starts from the bag of source tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.batch import ModelKind, Sequences
from dstrain.generation.constraints import SpecialIds
from dstrain.model_output import Memory, ModelOutput

IDS = SpecialIds(pad=1, eos=2, unk=3)
DIM = 8


class ToyState:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden  # (b, rows per sentence, D)

    def reorder(self, rows: Tensor) -> None:
        rows = rows.view(len(self.hidden), -1)
        num_rows = self.hidden.shape[1]
        assert torch.equal(rows // num_rows, torch.arange(len(rows))[:, None].expand_as(rows)), "a row left its sentence"
        self.hidden = torch.stack([hidden[row % num_rows] for hidden, row in zip(self.hidden, rows, strict=True)])

    def keep(self, sentences: Tensor) -> None:
        self.hidden = self.hidden[sentences]


class ToyModel:
    """Implements Generative and TeacherForced. `sharpness` scales the logits."""

    kind: ModelKind = "encoder_decoder"

    def __init__(self, vocab_size: int, *, seed: int = 0, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab_size, DIM, generator=generator)
        self.source_embedding = self.embedding.clone()
        self.recurrent = torch.randn(DIM, DIM, generator=generator) * 0.7
        self.output = torch.randn(vocab_size, DIM, generator=generator) * sharpness
        self.steps: list[int] = []

    def encode(self, source: Sequences) -> Tensor:
        real = torch.arange(source.tokens.shape[1]) < source.lengths[:, None]
        return (self.source_embedding[source.tokens] * real[:, :, None]).sum(1).tanh()

    def next_hidden(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return (hidden @ self.recurrent + self.embedding[tokens]).tanh()

    def __call__(self, source: Sequences | None, target: Sequences) -> ModelOutput:
        assert source is not None
        memory = hidden = self.encode(source)
        states = []
        for position in range(target.tokens.shape[1]):
            hidden = self.next_hidden(hidden, target.tokens[:, position])
            states.append(hidden)
        return ModelOutput(torch.stack(states, 1), Memory(memory, source.lengths))

    def invalidates_cache(self, length: int) -> bool:
        return False

    def project(self, hidden: Tensor) -> Tensor:
        return hidden @ self.output.T

    def prepared(self) -> ToyModel:
        return self

    def start(self, source: Sequences | None, *, num_sentences: int, rows_per_sentence: int, max_length: int) -> ToyState:
        hidden = torch.zeros(num_sentences, DIM) if source is None else self.encode(source)
        return ToyState(hidden[:, None].expand(-1, rows_per_sentence, -1))

    def step(self, tokens: Tensor, state: ToyState) -> Tensor:
        self.steps.append(len(tokens))
        logits = []
        for position in range(tokens.shape[1]):
            state.hidden = self.next_hidden(state.hidden, tokens[:, position].view(state.hidden.shape[:2]))
            logits.append(self.project(state.hidden).flatten(0, 1))
        return torch.stack(logits, 1)


def sequences(rows: list[list[int]]) -> Sequences:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), IDS.pad)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return Sequences(tokens, lengths)


def random_sources(count: int, vocab_size: int, *, seed: int = 0, longest: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [[*torch.randint(4, vocab_size, (n,), generator=generator).tolist(), IDS.eos] for n in lengths]


def log_probs(model: ToyModel, source: list[int], prefix: list[int], *, temperature: float = 1.0) -> list[float]:
    """Of each next token after `prefix`, by the whole forward pass."""
    hidden = model(sequences([source]), sequences([[IDS.eos, *prefix]])).hidden[0, -1]
    return (model.project(hidden) / temperature).double().log_softmax(-1).tolist()
