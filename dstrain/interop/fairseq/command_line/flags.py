"""The options of `fairseq-train` for text: which take a value, and which have no counterpart in a recipe, with the reason.

Names are without dashes at the front. An option that stands in no table here is reported as unknown.
"""

from __future__ import annotations

ALIASES = {
    "s": "source-lang",
    "t": "target-lang",
    "a": "arch",
    "max-sentences": "batch-size",
    "max-sentences-valid": "batch-size-valid",
    "relu-dropout": "activation-dropout",
    "nval": "max-valid-steps",
    "save-async": "write-checkpoints-asynchronously",
    "lr-period": "lr-period-updates",
}

_SWITCHES = """
    adam-stable adaptive-input amp azureml-logging bf16 broadcast-buffers checkpoint-activations combine-valid-subsets cpu
    cpu-offload cross-self-attention decoder-learned-pos decoder-normalize-before decoder-use-glu decoder-use-rmsnorm
    disable-validation distributed-no-spawn ema-fp32 encoder-learned-pos encoder-normalize-before encoder-use-glu
    encoder-use-rmsnorm eval-bleu eval-bleu-print-samples eval-tokenized-bleu export fast-stat-sync find-unused-parameters
    fix-batches-to-gpus fp16 fp16-adam-stats fp16-no-flatten-grads fp32-reduce-scatter future-target gradient-as-bucket-view
    grouped-shuffling ignore-unused-valid-subsets layernorm-embedding length-normalize-loss load-alignments
    load-checkpoint-liberally load-checkpoint-on-all-dp-ranks maximize-best-checkpoint-metric memory-efficient-bf16
    memory-efficient-fp16 merge-src-tgt-embed no-cross-attention no-decoder-final-norm no-epoch-checkpoints no-last-checkpoints
    no-progress-bar no-reshard-after-forward no-save no-save-optimizer-state no-scale-embedding no-token-positional-embeddings
    not-fsdp-flatten-parameters offload-activations on-cpu-convert-precision pad-to-fixed-bsz pad-to-fixed-length past-target
    pipeline-model-parallel profile report-accuracy reset-dataloader reset-logging reset-lr-scheduler reset-meters reset-optimizer
    run-sanity-validation-steps scale-attn scale-fc scale-heads scale-resids self-target sentence-avg share-all-embeddings
    share-decoder-input-output-embed skip-invalid-size-inputs-valid-test skip-remainder-batch store-ema suppress-crashes
    tie-adaptive-proj tie-adaptive-weights tpu truncate-source update-epoch-batch-itr update-ordered-indices-seed use-bmuf
    use-native-attention use-old-adam use-plasma-view use-sharded-state write-checkpoints-asynchronously add-bos-token
    """
SWITCHES = frozenset(_SWITCHES.split())
"""Options without a value."""

MAY_BE_BARE = frozenset({"eval-bleu-remove-bpe", "left-pad-source", "left-pad-target"})
"""Options whose value may be left out."""

_KEYS = {
    "data": "source-lang target-lang task bpe sentencepiece-model valid-subset",
    "batching": "max-tokens batch-size update-freq distributed-world-size required-batch-size-multiple",
    "model": "arch",
    "model.model_dim": "encoder-embed-dim decoder-embed-dim decoder-input-dim decoder-output-dim",
    "model.norm_order": "encoder-normalize-before decoder-normalize-before",
    "model.norm": "encoder-use-rmsnorm decoder-use-rmsnorm",
    "model.activation": "activation-fn",
    "model.position": """
        encoder-learned-pos decoder-learned-pos no-token-positional-embeddings rope-args yarn-args alibi-args""",
    "model.embedding": """
        no-scale-embedding layernorm-embedding share-all-embeddings share-decoder-input-output-embed
        encoder-factorized-embed-dim decoder-factorized-embed-dim factorized-embed-activation-fn""",
    "model.{encoder,decoder}.depth": "encoder-layers decoder-layers",
    "model.{encoder,decoder}.unique_layers": "encoder-recurrent-stacking decoder-recurrent-stacking",
    "model.{encoder,decoder}.num_heads": "encoder-attention-heads decoder-attention-heads",
    "model.{encoder,decoder}.num_kv_heads": "encoder-kv-attention-heads decoder-kv-attention-heads",
    "model.{encoder,decoder}.ffn_dim": "encoder-ffn-embed-dim decoder-ffn-embed-dim",
    "model.{encoder,decoder}.feed_forward": "encoder-use-glu decoder-use-glu",
    "model.{encoder,decoder}.layer_drop": "encoder-layerdrop decoder-layerdrop",
    "model.decoder.final_norm": "no-decoder-final-norm",
    "model.decoder.output_activation": "decoder-output-activation-fn",
    "model.{dropout,attention_dropout,activation_dropout}": "dropout attention-dropout activation-dropout",
    "model.{max_source_length,max_target_length}": "max-source-positions max-target-positions tokens-per-sample",
    "adapter": "lora-args",
    "objective": """
        criterion label-smoothing rdrop-alpha length-normalize-loss sentence-avg kd-args teacher-checkpoint-path language-tags""",
    "optimizer": "optimizer lr adam-betas adam-eps weight-decay adam-stable",
    "schedule": """
        lr-scheduler warmup-updates warmup-init-lr total-num-update end-learning-rate power lr-period-updates min-lr t-mult
        lr-shrink force-anneal warmup-steps hold-steps decay-steps phase-ratio init-lr-scale final-lr-scale""",
    "engine.precision": "fp16 memory-efficient-fp16 amp bf16 memory-efficient-bf16",
    "engine.clip_norm": "clip-norm",
    "engine.deepspeed": """
        ddp-backend zero-sharding cpu-offload fp16-init-scale fp16-scale-window fp16-scale-tolerance min-loss-scale""",
    "training": "seed max-update max-epoch stop-time-hours",
    "training.ema": "store-ema ema-decay ema-start-update",
    "validation.{unit,every}": "validate-interval validate-interval-updates",
    "validation.metric": "best-checkpoint-metric maximize-best-checkpoint-metric",
    "validation.patience": "patience",
    "validation.run_sanity_validation": "run-sanity-validation-steps",
    "validation.generation": "eval-bleu eval-bleu-args eval-bleu-detok eval-bleu-remove-bpe eval-tokenized-bleu",
    "checkpoint": """
        save-interval save-interval-updates keep-interval-updates keep-last-epochs keep-best-checkpoints no-epoch-checkpoints""",
    "reporting": "log-interval tensorboard-logdir wandb-project wandb-run-name",
    "nothing": "attn-implementation use-native-attention",
}
MAPPED: dict[str, str] = {name: key for key, names in _KEYS.items() for name in names.split()}
"""Options that the conversion reads, with the part of a recipe that they become."""

_REASONS = {
    "how many processes there are, and where, is the launcher's business (deepspeed, torchrun, slurm/)": """
        distributed-num-procs distributed-rank distributed-backend distributed-init-method distributed-port device-id
        distributed-no-spawn nprocs-per-node model-parallel-size pipeline-model-parallel cpu""",
    "how gradients are exchanged and memory is spent stands in the DeepSpeed file (engine.deepspeed)": """
        ddp-comm-hook bucket-cap-mb fix-batches-to-gpus find-unused-parameters gradient-as-bucket-view fast-stat-sync
        broadcast-buffers slowmo-momentum slowmo-base-algorithm localsgd-frequency no-reshard-after-forward fp32-reduce-scatter
        use-sharded-state not-fsdp-flatten-parameters on-cpu-convert-precision fp16-no-flatten-grads min-params-to-wrap
        checkpoint-activations offload-activations empty-cache-freq all-gather-list-size amp-batch-retries amp-init-scale
        amp-scale-window threshold-loss-scale""",
    "a hung rank is named and ended after training.hang_seconds": "heartbeat-timeout",
    "RUN/events.jsonl holds every number; the progress bar follows the terminal": """
        no-progress-bar log-format log-file""",
    "dstrain reports to TensorBoard and Weights & Biases only": "aim-repo aim-run-hash azureml-logging",
    "DeepSpeed's own profiler is switched on in the DeepSpeed file": "profile",
    "an error always ends the run": "suppress-crashes",
    "no plug-ins are read; models and tasks are what the recipe says": "user-dir",
    "prepared data are memory-mapped and read ahead": "num-workers data-buffer-size use-plasma-view plasma-path dataset-impl",
    "rows are padded to the longest of their batch": """
        required-seq-len-multiple num-batch-buckets pad-to-fixed-length pad-to-fixed-bsz""",
    "pads stand at the right and change no result": "left-pad-source left-pad-target",
    "the shuffle of an epoch depends on the seed and the epoch alone": """
        curriculum grouped-shuffling update-ordered-indices-seed update-epoch-batch-itr fixed-validation-seed""",
    "no sentence is ever left out of an epoch": "skip-remainder-batch",
    "training pairs over data.filter are dropped and counted; evaluation keeps every pair": "skip-invalid-size-inputs-valid-test",
    "long sentences are dropped by data.filter, not cut": "truncate-source shorten-method shorten-data-split-list",
    "the training split is what data.train lists": "train-subset gen-subset upsample-primary num-shards shard-id",
    "one validation split drives everything; `dstrain validate --split` scores the others": """
        combine-valid-subsets ignore-unused-valid-subsets""",
    "validation goes by batching.max_tokens and reads the whole split": "max-tokens-valid batch-size-valid max-valid-steps",
    "validation cannot be switched off; validation.every says how rarely it runs": "disable-validation",
    "validation runs from the first time on that validation.every names": "validate-after-updates",
    "training ends at training.max_steps, max_epochs or max_hours": "stop-min-lr",
    "the run directory is `dstrain train --output RUN`": "save-dir",
    "a new run starts from other weights by `dstrain train --base BUNDLE`; `dstrain import fairseq` makes the bundle": """
        restore-file continue-once finetune-from-model""",
    "`dstrain train` resumes what RUN holds, bit for bit; a new run has a new optimizer, schedule and order": """
        reset-dataloader reset-lr-scheduler reset-meters reset-optimizer reset-logging optimizer-overrides""",
    "loading is strict; what does not fit is an error": "load-checkpoint-liberally",
    "checkpoints are whole, verified and written by all ranks": """
        no-save no-last-checkpoints no-save-optimizer-state keep-interval-updates-pattern checkpoint-suffix checkpoint-shard-count
        load-checkpoint-on-all-dp-ranks write-checkpoints-asynchronously""",
    "the moving average is in fp32, updated at each step and starts from the weights": "ema-fp32 ema-update-freq ema-seed-model",
    "accuracy is not measured": "report-accuracy",
    "every target token counts": "ignore-prefix-size",
    "alignments are not trained": "load-alignments alignment-lambda alignment-heads alignment-layer full-context-alignment",
    "Adam is torch's fused one, its state in fp32": "fp16-adam-stats use-old-adam use-bmuf",
    "weights start from the seed or from a bundle (`--base`)": """
        encoder-embed-path decoder-embed-path decoder-layers-to-keep encoder-layers-to-keep""",
    "adaptive input and softmax are not built; the vocabulary projection is chunked instead": """
        adaptive-input adaptive-softmax-cutoff adaptive-softmax-dropout adaptive-softmax-factor tie-adaptive-weights
        tie-adaptive-proj adaptive-input-factor adaptive-input-cutoff""",
    "such a decoder is not built": "no-cross-attention cross-self-attention merge-src-tgt-embed",
    "such layers are not built": """
        base-layers base-sublayers base-shuffle scale-attn scale-fc scale-heads scale-resids quant-noise-pq
        quant-noise-pq-block-size quant-noise-scalar quantization-config-path encoder-xformers-att-config
        decoder-xformers-att-config export""",
    "kernels are chosen by the device": "torch-compile",
    "text is split by dictionaries and SentencePiece alone": """
        tokenizer moses-source-lang moses-target-lang moses-no-dash-splits moses-no-escape bpe-codes bpe-separator
        gpt2-encoder-json gpt2-vocab-bpe bpe-vocab sentencepiece-enable-sampling sentencepiece-alpha""",
    "text is made by the tokenizer, which undoes its own splitting": "eval-bleu-detok-args eval-bleu-print-samples",
    "BLEU is sacreBLEU's, chrF stands beside it": "scoring",
    "there is no such device": "tpu",
    "the rate is a function of the step alone": "lr-patience lr-threshold",
    "a target is what follows its own beginning": """
        sample-break-mode self-target future-target past-target add-bos-token output-dictionary-size""",
}
WITHOUT: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Options that a recipe has no key for, with the reason."""
