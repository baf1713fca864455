"""A bundle as a model of CTranslate2: a directory that its Translator or Generator loads.

DIR/model.bin, config.json, *vocabulary.json   written by CTranslate2's own classes
DIR/tokenizer/                                 as in the bundle
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.checkpoint.bundle import StoredBundle, find_bundle
from dstrain.data.tokenizers.tokenizer import TokenizerPair, save_tokenizers
from dstrain.errors import ExportError
from dstrain.extras import import_extra
from dstrain.interop.ctranslate2.check import largest_difference
from dstrain.interop.ctranslate2.limits import changes, unsupported
from dstrain.interop.ctranslate2.model import SpecBuilder
from dstrain.interop.ctranslate2.options import MODEL_FILE, MODEL_KIND, CTranslate2Export
from dstrain.interop.ctranslate2.vocabulary import register_vocabularies, start_names, usage
from dstrain.storage.atomic import atomic_directory, named_if_full
from dstrain.storage.outputs import check_output_of_kind

LARGEST_DIFFERENCE = 1e-2
"""In nats: far above rounding in float32, and far below what a layer that is computed otherwise makes."""


def export_ctranslate2(options: CTranslate2Export) -> list[str]:
    """Write the model, its adapters merged, and check it; returns lines on what was written and how it is read.

    ExtraError: CTranslate2 is not installed. ExportError: the model has parts that it lacks, or no tokenizer, or scores otherwise
    there. BundleError as `find_bundle`. StorageError as `check_output_of_kind`.
    """
    ctranslate2 = import_extra("ctranslate2", extra="ctranslate2", purpose="export to CTranslate2")
    stored = find_bundle(options.bundle, options.base)
    check_output_of_kind(options.output, stored.sources, marker=MODEL_FILE, kind=MODEL_KIND, overwrite=options.overwrite)
    config, tokenizers = stored.description.model, _tokenizers(stored)
    starts = start_names(stored.recipe(), tokenizers)
    if problems := list(unsupported(config)):
        raise ExportError(f"CTranslate2 cannot represent {'; '.join(problems)}; {stored.directory} runs by `dstrain generate`")
    with named_if_full(options.output), atomic_directory(options.output.resolve()) as fresh:
        name = _write(ctranslate2.specs, stored, tokenizers, starts=starts, directory=fresh, quantization=options.quantization)
        difference = largest_difference(ctranslate2, fresh, stored, tokenizers, starts)
        if options.quantization in (None, "float32") and not difference < LARGEST_DIFFERENCE:
            raise ExportError(
                f"CTranslate2 {ctranslate2.__version__} scores random tokens of {stored.directory} otherwise, by up to "
                f"{difference:.2g} nats, so nothing is written; tell the authors of dstrain"
            )
    adapters = [f"adapters: {len(stored.adapters)}, merged"] if stored.adapters else []
    return [
        f"{options.bundle} -> {options.output}: {name}, {options.quantization or 'float32'}",
        *adapters,
        *changes(config),
        f"checked: log-probabilities of random tokens differ by up to {difference:.2g} nats",
        *usage(tokenizers, config, stored.task, starts),
    ]


def _write(
    specs: Any,
    stored: StoredBundle,
    tokenizers: TokenizerPair,
    *,
    starts: Mapping[str, str],
    directory: Path,
    quantization: str | None,
) -> str:
    """Returns the name of the specification, which has all weights in memory and ends here."""
    spec = SpecBuilder(specs, stored.description.model, stored).build()
    register_vocabularies(spec, tokenizers, starts)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(directory))
    save_tokenizers(tokenizers, directory / "tokenizer")
    return str(spec.name)


def _tokenizers(stored: StoredBundle) -> TokenizerPair:
    tokenizers = stored.tokenizers()
    if tokenizers is None:
        raise ExportError(f"{stored.directory} has no tokenizer, and CTranslate2 knows entries by name; import it with one")
    return tokenizers
