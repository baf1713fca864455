"""The verbs, each with its line in `dstrain --help`, in the order of use. The module of a verb has its name."""

VERBS = {
    "recipes": "list the shipped recipes",
    "show": "check a recipe and print it resolved",
    "estimate": "say what memory, traffic and time a training will need, and recommend a layout",
    "prepare": "turn text into a tokenizer and Arrow shards",
    "train": "train, or resume training, into a run directory",
    "generate": "translate a file with a bundle",
    "interactive": "translate line by line from a terminal or a pipe",
    "evaluate": "score hypotheses: BLEU, chrF, TER with sacreBLEU signatures",
    "validate": "loss, perplexity and BLEU of a bundle on prepared data",
    "text": "write the raw text of an evaluation split",
    "consolidate": "make a bundle from a training checkpoint",
    "average": "average bundles into one",
    "extend": "give a bundle with rotary positions a longer context",
    "merge": "merge an adapter bundle into its base, as a plain bundle",
    "report": "draw the curves of a run as PNG and HTML",
    "import": "bring what fairseq made: checkpoints, binarized data, command lines",
    "completion": "print the script that completes verbs, options and recipes in your shell",
    "inspect": "describe a data directory, a bundle or dumped logits, and check that they are complete",
    "pseudo-label": "let a teacher translate the training sources: data for a student",
    "dump-logits": "write a teacher's distribution of every token to disk, to distill from later",
}
