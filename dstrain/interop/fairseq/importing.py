"""`dstrain import fairseq`: checkpoint and dictionaries in, a bundle with its recipe out, and a report of what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.checkpoint.directories import TOKENIZER
from dstrain.data.tokenizers.tokenizer import TokenizerPair, with_tags
from dstrain.errors import ImportFormatError, RecipeError
from dstrain.interop.fairseq.bundle import BASE, save_imported
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, left_out, read_dictionaries, read_fairseq_checkpoint
from dstrain.interop.fairseq.command_line.convert import note_lines
from dstrain.interop.fairseq.lora import ForeignAdapter, convert_adapted
from dstrain.interop.fairseq.training_recipe import recipe_of_checkpoint
from dstrain.models.config import ModelConfig

CRASH = "crash.pt"
"""fairseq writes it from the middle of a step, with adapters that are not merged."""


@dataclass(frozen=True)
class FairseqImport:
    """dictionary: directory of the dictionaries, None = the data directory that the checkpoint names. sentencepiece: models in
    front of them, of source and target. tags: words that these do not split. pair: the direction of a multilingual model.
    overwrite: replace a bundle at `output`."""

    checkpoint: Path
    output: Path
    dictionary: Path | None = None
    sentencepiece: tuple[Path, Path] | None = None
    tags: Sequence[str] = ()
    unmerged: bool = False
    pair: str | None = None
    overwrite: bool = False


def import_checkpoint(options: FairseqImport) -> list[str]:
    """Write the bundle; the lines of a report. ImportFormatError, DataError, BundleError name what does not fit."""
    checkpoint = read_fairseq_checkpoint(options.checkpoint, options.pair)
    directory = options.dictionary or Path(checkpoint.data_directory)
    tokenizers = with_tags(read_dictionaries(directory, checkpoint, options.sentencepiece), options.tags)
    unmerged = options.unmerged or options.checkpoint.name == CRASH
    config, vocabulary, weights, adapter = convert_adapted(checkpoint, tokenizers, unmerged=unmerged)
    recipe, remarks = _recipe(options, checkpoint, config, adapter, directory)
    save_imported(
        options.output,
        model_config=config,
        vocabulary=vocabulary,
        weights=weights,
        adapter=adapter,
        tokenizers=tokenizers,
        recipe=recipe,
        notes={"imported_from": "fairseq", "checkpoint": options.checkpoint.name, "arch": checkpoint.model.get("arch")},
        overwrite=options.overwrite,
    )
    parameters = sum(tensor.numel() for tensor in weights.values())
    stacks = [config.encoder, config.decoder] if config.kind == "encoder_decoder" else [config.decoder]
    depths = " + ".join(str(stack.depth) for stack in stacks)
    sizes = f"{vocabulary.source:,} and {vocabulary.target:,}"
    return [
        *remarks,
        *(f"left out {', '.join(names)}: {reason}" for reason, names in left_out(checkpoint).items()),
        *_marker_lines(checkpoint, tokenizers),
        f"wrote {options.output}: {parameters:,} parameters, {depths} layers, vocabularies {sizes}",
    ]


def _recipe(
    options: FairseqImport,
    checkpoint: FairseqCheckpoint,
    config: ModelConfig,
    adapter: ForeignAdapter | None,
    directory: Path,
) -> tuple[dict[str, Any] | None, list[str]]:
    """The recipe, if the settings make one, and lines about it."""
    bundle = options.output if adapter is None else options.output / BASE
    try:
        recipe, notes = recipe_of_checkpoint(
            checkpoint,
            config,
            adapter,
            directory=directory,
            tokenizer=bundle / TOKENIZER,
            models=options.sentencepiece,
            tags=options.tags,
        )
    except (ImportFormatError, RecipeError) as error:
        return None, [f"no recipe.yaml: the checkpoint's settings make none ({error})"]
    command = f"dstrain train {options.output}/recipe.yaml --data DATA --base {bundle} --output RUN"
    return recipe, [
        *filter(None, note_lines(notes)),
        f"recipe.yaml is that of the checkpoint's training; train it further: {command}",
    ]


def _marker_lines(checkpoint: FairseqCheckpoint, tokenizers: TokenizerPair) -> Iterator[str]:
    """What is put around every text."""
    for side, tokenizer in (("source", tokenizers.source), ("target", tokenizers.target)):
        markers = getattr(tokenizer, "markers", None)
        if markers is not None and markers.model_dump(exclude_defaults=True):
            language = checkpoint.task.get(f"{side}_lang")
            reads = f"; the decoder reads {markers.start or markers.end} first" if side == "target" else ""
            yield f"{side} {language}: {' '.join([*markers.before, 'text', *markers.after, markers.end])}{reads}"
