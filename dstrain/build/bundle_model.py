"""A bundle as an object that generates and scores text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dstrain.arguments import require_ids, require_path, require_same_number, require_texts
from dstrain.build.adapted_model import adapted_bundle
from dstrain.build.device import usable_device, usable_precision
from dstrain.checkpoint.bundle import Bundle, load_bundle
from dstrain.config_base import Precision, PrecisionChoice
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import batches_by_length
from dstrain.data.directions import DirectionIds, direction_ids, directions_of
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.errors import ArgumentError, BundleError, DataError
from dstrain.generation.config import GenerationConfig, generation_config
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator, TextHypothesis, fitting, ignore_progress, source_ids
from dstrain.generation.scoring import score_targets, teacher_forced_logits

MAX_TOKENS = 8192
"""Padded tokens of one batch of `logits`."""


def load(
    bundle: str | Path,
    device: str | torch.device = "cpu",
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    precision: PrecisionChoice = "auto",
) -> BundleModel:
    """Read a bundle directory. device: cpu, cuda, cuda:1, a `torch.device`, or auto for a GPU if there is one.

    base: of an adapter bundle, if it has moved. adapter: over the bundle, see `BundleModel.adapted`. precision: of the
    computation, auto = bf16 on a GPU that has it, else fp32.

    BundleError: the bundle is missing, incomplete or altered. ArgumentError: no such device or precision.
    """
    directory, chosen = require_path("bundle", bundle), usable_device(device)
    opened = load_bundle(directory, device=chosen, base=None if base is None else require_path("base", base))
    computed = usable_precision(precision, chosen)
    opened.model.to(COMPUTE_DTYPES[computed])
    model = BundleModel(opened, chosen, computed)
    return model if adapter is None else model.adapted(adapter)


class BundleModel:
    """A bundle ready for use, in evaluation mode. device, precision: of its computation."""

    def __init__(self, bundle: Bundle, device: str, precision: Precision) -> None:
        self.bundle = bundle
        self.device = device
        self.precision = precision

    def adapted(self, adapter: str | Path) -> BundleModel:
        """This model with an adapter, which shares its tensors; this one stays as it is, so several may be used in turns.

        adapter: an adapter bundle that was trained on this one, or a LoRA adapter of PEFT over its modules' names. Errors as
        `adapted_bundle`.
        """
        return BundleModel(adapted_bundle(self.bundle, require_path("adapter", adapter)), self.device, self.precision)

    @property
    def continues(self) -> bool:
        """Whether this is a language model: a line is the beginning of a text that it continues, not a source."""
        return self.bundle.task == "continuation"

    @property
    def tokenizer(self) -> TokenizerPair:
        """Tokenizers of source and target. BundleError if the bundle was made without them."""
        if self.bundle.tokenizers is None:
            raise BundleError(f"{self.bundle.directory} has no tokenizer, so it reads no text; use `logits`, or import with one")
        return self.bundle.tokenizers

    def generate(
        self,
        sentences: Sequence[str],
        *,
        direction: str | None = None,
        prefixes: Sequence[str] | None = None,
        kind: Literal["beam", "sampling"] | None = None,
        beam_size: int | None = None,
        groups: int | None = None,
        diversity: float | None = None,
        num_best: int | None = None,
        score: Literal["normalized", "sum"] | None = None,
        length_penalty: float | None = None,
        min_length: int | None = None,
        max_length_ratio: float | None = None,
        max_length_offset: int | None = None,
        no_repeat_ngram: int | None = None,
        unk_penalty: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        truncate_source: bool = False,
    ) -> list[list[TextHypothesis]]:
        """For each sentence its `num_best` hypotheses, best first; an empty sentence without prefix has an empty one.

        A language model continues the sentence, which its hypotheses repeat; other models translate it (see `continues`).
        direction: names the tags and the start token of a multilingual model, such as en-de. prefixes: for each sentence the text
        that its hypotheses begin with; free where empty. The other options are those of
        `generation.config`; the others follow the bundle's recipe. RecipeError: an option that this method does not have,
        or of no valid value. ArgumentError: no list of texts. DataError: a sentence longer than the model reads, without
        truncate_source.
        """
        options = {
            "kind": kind,
            "beam_size": beam_size,
            "groups": groups,
            "diversity": diversity,
            "num_best": num_best,
            "score": score,
            "length_penalty": length_penalty,
            "min_length": min_length,
            "max_length_ratio": max_length_ratio,
            "max_length_offset": max_length_offset,
            "no_repeat_ngram": no_repeat_ngram,
            "unk_penalty": unk_penalty,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        config = self.generation_config(options)
        return self.translate(sentences, config, direction=direction, prefixes=prefixes, truncate_source=truncate_source)

    def translate(
        self,
        sentences: Sequence[str],
        config: GenerationConfig,
        *,
        direction: str | None = None,
        prefixes: Sequence[str] | None = None,
        truncate_source: bool = False,
        first_line: int = 1,
        progress: Callable[[int], object] = ignore_progress,
    ) -> list[list[TextHypothesis]]:
        """As `generate`, by a whole configuration. first_line, progress: as in `generation.generator`."""
        sentences = require_texts("sentences", sentences)
        if prefixes is not None:
            prefixes = require_texts("prefixes", prefixes)
            require_same_number("sentences", sentences, "prefixes", prefixes)
        if self.continues:
            sentences, prefixes = [""] * len(sentences), _beginnings(sentences, prefixes, first_line)
        tokenizer, toward = self.tokenizer, self.direction_ids(direction)
        generator = Generator(
            self.bundle.model,
            config,
            SpecialIds.of(tokenizer.target, start=toward.start),
            limits=self.bundle.model_config.limits,
            device=self.device,
            truncate_source=truncate_source,
        )
        return generator.translate(
            sentences,
            tokenizer.source,
            tokenizer.target,
            tags=toward.source_tags,
            prefixes=prefixes,
            first_line=first_line,
            progress=progress,
        )

    def direction_ids(self, direction: str | None) -> DirectionIds:
        """The tags and the start token that the recipe gives to a direction.

        ArgumentError: a direction that the bundle's recipe does not know, or none if it tells several apart.
        """
        tagged, corpora = directions_of(self.bundle.recipe), (self.bundle.recipe or {}).get("data", {}).get("train", ())
        names = dict.fromkeys([*tagged, *(corpus["name"] for corpus in corpora if corpus.get("name"))])
        if direction is None and not tagged:
            return DirectionIds()
        if direction is None or direction not in names:
            known = f"choose one of {', '.join(names)}" if names else "the bundle's recipe names none: leave it out"
            problem = f"direction = {direction} (--direction) names no direction of {self.bundle.directory}"
            if direction is None:
                problem = f"no direction is given (--direction), and {self.bundle.directory} translates in several"
            raise ArgumentError(f"{problem}; {known}")
        if direction not in tagged:
            return DirectionIds()
        return direction_ids(direction, tagged[direction], self.tokenizer)

    def generation_config(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The `generation` section of the bundle's recipe, overridden as the function `generation_config` does."""
        return generation_config((self.bundle.recipe or {}).get("generation"), options)

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        direction: str | None = None,
        score: Literal["normalized", "sum"] | None = None,
        length_penalty: float | None = None,
        truncate: bool = False,
    ) -> list[TextHypothesis]:
        """Each target as a hypothesis of its source, scored as a search would score it; a language model wants empty sources.

        ArgumentError: unequal numbers of texts. DataError: one longer than the model reads, without truncate.
        """
        config = self.generation_config({"score": score, "length_penalty": length_penalty})
        return self.score_texts(sources, targets, config, direction=direction, truncate=truncate)

    def score_texts(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        config: GenerationConfig,
        *,
        direction: str | None = None,
        truncate: bool = False,
        first_line: int = 1,
        progress: Callable[[int], object] = ignore_progress,
    ) -> list[TextHypothesis]:
        """As `score`, by a whole configuration. first_line, progress: as in `generation.generator`."""
        sources, targets = require_texts("sources", sources), require_texts("targets", targets)
        require_same_number("sources", sources, "targets", targets)
        if self.continues:
            _refuse_sources(sources, first_line)
        tokenizer, limits, toward = self.tokenizer, self.bundle.model_config.limits, self.direction_ids(direction)
        encoded = source_ids(sources, tokenizer.source, toward.source_tags)
        encoded_targets = [[*row, tokenizer.target.eos_id] for row in tokenizer.target.encode(targets)]
        fitting_sources = fitting(encoded, [limits.source] * len(encoded), truncate=truncate, first_line=first_line)
        after = [limits.target_after(len(source)) for source in fitting_sources]
        target_ids = fitting(encoded_targets, after, truncate=truncate, first_line=first_line, what="target")
        ids = SpecialIds.of(tokenizer.target, start=toward.start)
        scored: dict[int, TextHypothesis] = {}
        for rows in batches_by_length(longer_of(fitting_sources, target_ids), range(len(targets)), config.max_tokens):
            batch = [[side[row] for row in rows] for side in (fitting_sources, target_ids)]
            results = score_targets(self.bundle.model, *batch, config=config, ids=ids, device=self.device)
            for row, hypothesis in zip(rows, results, strict=True):
                scored[row] = TextHypothesis(hypothesis.tokens, hypothesis.score, hypothesis.token_scores, targets[row])
            progress(len(rows))
        return [scored[row] for row in range(len(targets))]

    def logits(
        self, source_ids: Sequence[Sequence[int]] | None, target_input_ids: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float32]]:
        """Teacher-forced logits after each decoder input, one (T, V) float32 array a row, without padding.

        Under dynamic rotary scalings they are those of the whole row's length, as in training; a search and `score` take another
        pass for each token.

        source_ids: ids ending in EOS; None for a decoder-only model that reads no source. target_input_ids: EOS or another start
        token, then target tokens; both may be arrays. ArgumentError names the row or id that is not one of the model's.
        """
        vocabulary, kind, limits = self.bundle.vocabulary, self.bundle.model_config.kind, self.bundle.model_config.limits
        inputs = require_ids("target_input_ids", target_input_ids, vocabulary.target, limits.target)
        if source_ids is None:
            if kind == "encoder_decoder":
                raise ArgumentError("source_ids = None, but an encoder-decoder model reads sources; give one for each target")
            source_ids = [[vocabulary.eos_id]] * len(inputs)
        sources = require_ids("source_ids", source_ids, vocabulary.source, limits.source)
        require_same_number("source_ids", sources, "target_input_ids", inputs)
        for number, (source, tokens) in enumerate(zip(sources, inputs, strict=True)):
            if len(tokens) > (limit := limits.target_after(len(source))):
                length = f"{len(tokens)} ids after {len(source)} of the source"
                raise ArgumentError(f"target_input_ids[{number}] has {length}; the model reads at most {limit} there")
        collator = Collator(kind, pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id, start_id=vocabulary.start_id)
        results: dict[int, npt.NDArray[np.float32]] = {}
        for rows in batches_by_length(longer_of(sources, inputs), range(len(inputs)), MAX_TOKENS):
            batch = [[side[row] for row in rows] for side in (sources, inputs)]
            logits = teacher_forced_logits(self.bundle.model, *batch, collator=collator, device=self.device)
            for row, values in zip(rows, logits, strict=True):
                results[row] = values.cpu().numpy()
        return [results[row] for row in range(len(inputs))]


def _beginnings(lines: Sequence[str], prefixes: Sequence[str] | None, first_line: int) -> list[str]:
    """The text that a language model continues: each line or its prefix. DataError if there are both."""
    beginnings = []
    for number, (line, prefix) in enumerate(zip(lines, prefixes or [""] * len(lines), strict=True), first_line):
        if line.strip() and prefix.strip():
            raise DataError(
                f"line {number} ({line[:40]!r}) and its prefix: a language model continues one text; leave one of them empty"
            )
        beginnings.append(prefix if prefix.strip() else line)
    return beginnings


def _refuse_sources(lines: Sequence[str], first_line: int) -> None:
    for number, line in enumerate(lines, first_line):
        if line.strip():
            raise DataError(
                f"source line {number} ({line[:40]!r}): a language model scores whole texts, which have no source; leave it empty"
            )


def longer_of(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[int]:
    """The length of the longer side of each pair."""
    return [max(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
