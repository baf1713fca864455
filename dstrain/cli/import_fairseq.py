"""Convert a fairseq checkpoint of an encoder-decoder transformer into a bundle: weights, configuration and tokenizers.

dstrain import fairseq checkpoint_best.pt --dictionary data-bin --sentencepiece spm.model --output BUNDLE

A checkpoint with LoRA adapters becomes an adapter bundle; BUNDLE/base is the model that they were trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the format."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint*.pt file")
    parser.add_argument(
        "--dictionary",
        type=Path,
        metavar="DIR",
        help="directory of dict.SOURCE.txt and dict.TARGET.txt; default: the data directory that the checkpoint names",
    )
    parser.add_argument(
        "--sentencepiece",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="SentencePiece model in front of the dictionaries, or two: source, target; default: text is split by spaces",
    )
    parser.add_argument(
        "--language-tags",
        nargs="+",
        default=[],
        metavar="TAG",
        help="words before the text that SentencePiece does not split, or patterns of them: '???_????' for eng_Latn and the like",
    )
    parser.add_argument(
        "--unmerged",
        action="store_true",
        help="LoRA adapters are not merged into the weights; so it is in crash.pt, which is known by its name",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")


def run(args: argparse.Namespace) -> int:
    """Read, convert, write."""
    from dstrain.data.tokenizers.tokenizer import with_tags
    from dstrain.errors import ImportFormatError
    from dstrain.interop.fairseq.bundle import save_imported
    from dstrain.interop.fairseq.checkpoint import read_dictionaries, read_fairseq_checkpoint
    from dstrain.interop.fairseq.lora import convert_adapted
    from dstrain.log import logger

    models = args.sentencepiece
    if models and len(models) > 2:
        raise ImportFormatError(f"--sentencepiece takes one model or two (source, target), found {len(models)}")
    checkpoint = read_fairseq_checkpoint(args.checkpoint)
    directory = args.dictionary or Path(checkpoint.data_directory)
    tokenizers = read_dictionaries(directory, checkpoint, (models[0], models[-1]) if models else None)
    tokenizers = with_tags(tokenizers, args.language_tags)
    unmerged = args.unmerged or args.checkpoint.name == "crash.pt"
    config, vocabulary, weights, adapter = convert_adapted(checkpoint, tokenizers, unmerged=unmerged)
    save_imported(
        args.output,
        model_config=config,
        vocabulary=vocabulary,
        weights=weights,
        adapter=adapter,
        tokenizers=tokenizers,
        notes={"imported_from": "fairseq", "checkpoint": args.checkpoint.name, "arch": checkpoint.model.get("arch")},
    )
    parameters = sum(tensor.numel() for tensor in weights.values())
    stacks = [config.encoder, config.decoder] if config.kind == "encoder_decoder" else [config.decoder]
    depths = " + ".join(str(stack.depth) for stack in stacks)
    sizes = f"{vocabulary.source} and {vocabulary.target}"
    logger.info("wrote %s: %d parameters, %s layers, vocabularies %s", args.output, parameters, depths, sizes)
    return 0
