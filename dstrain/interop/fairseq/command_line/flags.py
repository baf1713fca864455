"""Options of `fairseq-train` without a counterpart in a recipe, with the reason, and other names of options.

An option that is neither here nor in options.py is reported as unknown. In the table, `!` marks an option without a value.
"""

from __future__ import annotations

from dstrain.interop.fairseq.options import OPTIONS

ALIASES = {
    "s": "source_lang",
    "t": "target_lang",
    "a": "arch",
    "max_sentences": "batch_size",
    "max_sentences_valid": "batch_size_valid",
    "relu_dropout": "activation_dropout",
    "nval": "max_valid_steps",
    "save_async": "write_checkpoints_asynchronously",
    "lr_period": "lr_period_updates",
}
MAY_BE_BARE = frozenset({"eval_bleu_remove_bpe", "left_pad_source", "left_pad_target"})
"""Options whose value may be left out."""

_REASONS = {
    "the launcher decides the number of processes and their devices (deepspeed, torchrun, slurm/)": """
        distributed-num-procs distributed-rank distributed-backend distributed-init-method distributed-port device-id
        distributed-no-spawn! nprocs-per-node model-parallel-size pipeline-model-parallel! cpu!""",
    "communication and memory are set in the DeepSpeed file (engine.deepspeed)": """
        ddp-comm-hook bucket-cap-mb fix-batches-to-gpus! find-unused-parameters! gradient-as-bucket-view! fast-stat-sync!
        broadcast-buffers! slowmo-momentum slowmo-base-algorithm localsgd-frequency no-reshard-after-forward!
        fp32-reduce-scatter! use-sharded-state! not-fsdp-flatten-parameters! on-cpu-convert-precision! fp16-no-flatten-grads!
        min-params-to-wrap checkpoint-activations! offload-activations! empty-cache-freq all-gather-list-size amp-batch-retries
        amp-init-scale amp-scale-window threshold-loss-scale""",
    "a hung rank is named and ended after training.hang_seconds": "heartbeat-timeout",
    "RUN/events.jsonl holds every number; the progress bar follows the terminal": "no-progress-bar! log-format log-file",
    "dstrain reports to TensorBoard and Weights & Biases only": "aim-repo aim-run-hash azureml-logging!",
    "DeepSpeed's own profiler is switched on in the DeepSpeed file": "profile!",
    "an error always ends the run": "suppress-crashes!",
    "no plug-ins are read; the recipe names model and task": "user-dir",
    "prepared data are memory-mapped and read ahead": "num-workers data-buffer-size use-plasma-view! plasma-path dataset-impl",
    "rows are padded to the longest of their batch": """
        required-seq-len-multiple num-batch-buckets pad-to-fixed-length! pad-to-fixed-bsz!""",
    "padding is on the right and changes no result": "left-pad-source left-pad-target",
    "the shuffle of an epoch depends only on the seed and the epoch": """
        curriculum grouped-shuffling! update-ordered-indices-seed! update-epoch-batch-itr! fixed-validation-seed""",
    "no sentence is ever left out of an epoch": "skip-remainder-batch!",
    "training pairs over data.filter are dropped and counted; evaluation keeps every pair": """
        skip-invalid-size-inputs-valid-test!""",
    "long text is dropped by data.filter, not cut": "shorten-method shorten-data-split-list",
    "the training split is listed in data.train": "train-subset gen-subset upsample-primary num-shards shard-id",
    "one validation split drives everything; `dstrain validate --split` scores the others": """
        combine-valid-subsets! ignore-unused-valid-subsets!""",
    "validation goes by batching.max_tokens and reads the whole split": "max-tokens-valid batch-size-valid max-valid-steps",
    "validation cannot be switched off; validation.every says how rarely it runs": "disable-validation!",
    "validation runs from the first interval of validation.every on": "validate-after-updates",
    "training ends at training.max_steps, max_epochs or max_hours": "stop-min-lr",
    "the run directory is `dstrain train --output RUN`": "save-dir",
    "a new run starts from other weights by `dstrain train --base BUNDLE`; `dstrain import fairseq` makes the bundle": """
        restore-file continue-once finetune-from-model""",
    "`dstrain train` resumes RUN bit for bit; a new run has a new optimizer, schedule and order": """
        reset-dataloader! reset-lr-scheduler! reset-meters! reset-optimizer! reset-logging! optimizer-overrides""",
    "loading is strict; weights that do not fit are an error": "load-checkpoint-liberally!",
    "checkpoints are whole, verified and written by all ranks": """
        no-save! no-last-checkpoints! no-save-optimizer-state! keep-interval-updates-pattern checkpoint-suffix
        checkpoint-shard-count load-checkpoint-on-all-dp-ranks! write-checkpoints-asynchronously!""",
    "the moving average is in fp32, updated at each step and starts from the weights": "ema-fp32! ema-update-freq ema-seed-model",
    "accuracy is not measured": "report-accuracy!",
    "every target token counts": "ignore-prefix-size",
    "alignments are not trained": "load-alignments! alignment-lambda alignment-heads alignment-layer full-context-alignment",
    "Adam is torch's fused one, its state in fp32": "fp16-adam-stats! use-old-adam! use-bmuf!",
    "weights start from the seed or from a bundle (`--base`)": "encoder-embed-path decoder-embed-path",
    "layers are not pruned": "decoder-layers-to-keep encoder-layers-to-keep",
    "adaptive input and softmax are not built; the vocabulary projection is chunked instead": """
        adaptive-input! adaptive-softmax-cutoff adaptive-softmax-dropout adaptive-softmax-factor tie-adaptive-weights!
        tie-adaptive-proj! adaptive-input-factor adaptive-input-cutoff""",
    "such a decoder is not built": "no-cross-attention! cross-self-attention! merge-src-tgt-embed!",
    "such layers are not built": """
        base-layers base-sublayers base-shuffle scale-attn! scale-fc! scale-heads! scale-resids! quant-noise-pq
        quant-noise-pq-block-size quant-noise-scalar quantization-config-path encoder-xformers-att-config
        decoder-xformers-att-config export!""",
    "kernels are chosen by the device": "torch-compile",
    "text is split only by dictionaries and SentencePiece": """
        tokenizer moses-source-lang moses-target-lang moses-no-dash-splits moses-no-escape bpe-codes bpe-separator
        gpt2-encoder-json gpt2-vocab-bpe bpe-vocab sentencepiece-enable-sampling sentencepiece-alpha""",
    "text is made by the tokenizer, which undoes its own splitting": "eval-bleu-detok-args eval-bleu-print-samples!",
    "BLEU and chrF are sacreBLEU's": "scoring",
    "there is no such device": "tpu!",
    "the learning rate depends only on the step": "lr-patience lr-threshold",
    "a recipe names no languages: tags in front of the text do (data.tokenizer.tags), or an imported tokenizer": """
        langs lang-pairs lang-dict lang-tok-style encoder-langtok decoder-langtok! lang-tok-replacing-bos-eos! langtoks
        langtoks-specs""",
    "fairseq never read it": "permute",
    "the order of an epoch is always random": "shuffle-instance!",
    "an example is a line of the text": "sample-break-mode",
    "the target is the next token": """
        self-target! future-target! past-target! add-bos-token! output-dictionary-size""",
}
_MARKED = {name.replace("-", "_"): reason for reason, names in _REASONS.items() for name in names.split()}
WITHOUT = {name.rstrip("!"): reason for name, reason in _MARKED.items()}
"""Options that a recipe has no key for, with the reason."""
SWITCHES = frozenset(
    [*(name for name, option in OPTIONS.items() if option.kind is bool), *(name[:-1] for name in _MARKED if name.endswith("!"))]
)
"""Options without a value."""
