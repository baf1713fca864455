"""Recipes from command lines: each one validates, says what was asked for, and names whatever it cannot say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dstrain.adapters.lora import adapter_targets, select
from dstrain.errors import ImportFormatError, RecipeError
from dstrain.interop.fairseq.command_line.convert import recipe_from_command
from dstrain.interop.fairseq.command_line.flags import ALIASES, MAY_BE_BARE, SWITCHES, WITHOUT
from dstrain.interop.fairseq.options import ARCHITECTURES, OPTIONS, PRESETS_OF
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.presets import PRESETS
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe
from tests.paths import GOLDEN, needs_golden

BASE = "fairseq-train data-bin -s en -t de --arch transformer --optimizer adam --lr 0.0005 --max-tokens 4096 --max-update 1000"


def text_of(words: str, base: str = BASE) -> str:
    return recipe_from_command(f"{base} {words}")


def tree_of(words: str, base: str = BASE) -> dict[str, Any]:
    tree = yaml.safe_load(text_of(words, base))
    assert isinstance(tree, dict)
    return tree


def notes_of(words: str, base: str = BASE) -> str:
    """The comments, each note on one line."""
    lines = [line[2:] for line in text_of(words, base).splitlines() if line.startswith("# ")]
    return "\n".join(lines).replace("\n  ", " ")


def recipe_of(words: str, tmp_path: Path, base: str = BASE) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text_of(words, base), encoding="utf-8")
    return load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_makes_a_recipe(arch: str, tmp_path: Path) -> None:
    recipe = recipe_of("", tmp_path, BASE.replace("transformer", arch))
    assert recipe.model.kind == ("decoder_only" if arch.startswith("transformer_lm") else "encoder_decoder")
    assert arch in recipe.description


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("transformer", 44_236_800),
        ("transformer_iwslt_de_en", 31_641_600),
        ("transformer_vaswani_wmt_en_de_big", 176_553_984),
        ("transformer_IT2", 831_410_176),
        ("transformer_IT2_dist", 132_485_120),
    ],
)
def test_architectures_have_the_predecessor_s_sizes(arch: str, parameters: int, tmp_path: Path) -> None:
    """Counted there with 64 entries on each side."""
    config = recipe_of("", tmp_path, BASE.replace("transformer", arch)).model
    with torch.device("meta"):
        model = build_model(config, VocabularySizes(source=64, target=64), seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("arch", PRESETS_OF)
def test_an_architecture_that_is_a_preset_becomes_it(arch: str, tmp_path: Path) -> None:
    base, preset = BASE.replace("transformer", arch), PRESETS_OF[arch]
    assert f"--arch {arch}: the preset {preset}, written out below" in notes_of("", base)
    assert recipe_of("", tmp_path, base).model == PRESETS[preset]
    assert recipe_of("--dropout 0.25", tmp_path, base).model == PRESETS[preset].model_copy(update={"dropout": 0.25})


def test_all_of_indictrans2_s_architectures_are_presets() -> None:
    plug_in = {f"transformer_{size}" for size in ("2x", "4x", "9x", "12e12d_9xeq", "18_18", "24_24", "base18L")}
    fork = {name for name in ARCHITECTURES if "IT2" in name}
    assert len(fork) == 6
    assert plug_in | fork <= PRESETS_OF.keys()
    assert set(PRESETS) - set(PRESETS_OF.values()) == {"tiny", "iwslt"}
    assert "says nothing of activation and sharing" in notes_of("", BASE.replace("transformer", "transformer_2x"))


VALUES = {
    "activation-fn": "gelu_accurate",
    "adam-betas": "'(0.8, 0.95)'",
    "alibi-args": """'{"alibi_asymmetrical": "false"}'""",
    "arch": "transformer_iwslt_de_en",
    "attn-implementation": "fast",
    "best-checkpoint-metric": "ppl",
    "bpe": "subword_nmt",
    "criterion": "adaptive_loss",
    "ddp-backend": "fully_sharded",
    "decoder-output-activation-fn": "tanh",
    "end-learning-rate": "1e-6",
    "eval-bleu-args": """'{"beam": 4, "max_len_a": 1.2, "iter_decode_max_iter": 3}'""",
    "eval-bleu-detok": "moses",
    "eval-bleu-remove-bpe": "sentencepiece",
    "factorized-embed-activation-fn": "relu",
    "kd-args": """'{"strategy": "word_seq_level"}'""",
    "label-smoothing": "0.1",
    "lora-args": """'{"r": 4, "alpha": 8, "target_modules": "q_proj,fc1"}'""",
    "lr": "0.1,0.2",
    "lr-scheduler": "inverse_sqrt",
    "optimizer": "adafactor",
    "phase-ratio": "0.1,0.4,0.5",
    "rope-args": """'{"type": "vanilla"}'""",
    "sentencepiece-model": "spm.model",
    "task": "denoising",
    "mask-length": "word",
    "replace-length": "1",
    "teacher-checkpoint-path": "teacher.pt",
    "update-freq": "4,8",
    "valid-subset": "valid,valid1",
    "yarn-args": """'{"type": "vanilla", "scale": 8}'""",
    "zero-sharding": "os",
    **dict.fromkeys(("dropout", "attention-dropout", "activation-dropout", "decoder-layerdrop", "encoder-layerdrop"), "0.25"),
    **dict.fromkeys(("encoder-embed-dim", "decoder-embed-dim", "decoder-input-dim", "decoder-output-dim"), "256"),
    **dict.fromkeys(("ema-decay", "adam-eps", "weight-decay", "final-lr-scale", "init-lr-scale", "rdrop-alpha"), "0.125"),
    **dict.fromkeys(("encoder-kv-attention-heads", "decoder-kv-attention-heads"), "2"),
    **dict.fromkeys(("max-source-positions", "max-target-positions", "max-tokens"), "512"),
    **dict.fromkeys(("keep-best-checkpoints", "patience", "seed", "max-epoch", "tokens-per-sample", "batch-size"), "16"),
    **dict.fromkeys(("source-lang", "target-lang"), "fr"),
    **dict.fromkeys(("mask", "mask-random", "insert", "rotate", "permute-sentences"), "0.25"),
    "min-lr": "1e-6",
    "warmup-init-lr": "1e-6",
}
SCHEDULES = {
    "inverse_sqrt": "warmup-updates warmup-init-lr",
    "polynomial_decay": "total-num-update end-learning-rate power",
    "cosine": "lr-period-updates min-lr t-mult lr-shrink",
    "tri_stage --warmup-steps 5 --hold-steps 5 --decay-steps 5": "warmup-steps hold-steps decay-steps phase-ratio",
    "tri_stage --phase-ratio 0.1,0.4,0.5": "init-lr-scale final-lr-scale",
    "fixed": "force-anneal",
}
CONTEXTS = {
    **{name: f"--lr-scheduler {scheduler}" for scheduler, names in SCHEDULES.items() for name in names.split()},
    **dict.fromkeys(("eval-bleu-args", "eval-bleu-detok", "eval-bleu-remove-bpe", "eval-tokenized-bleu"), "--eval-bleu"),
    "maximize-best-checkpoint-metric": "--eval-bleu --best-checkpoint-metric bleu",
    **dict.fromkeys(("ema-decay", "ema-start-update"), "--store-ema"),
    "label-smoothing": "--criterion label_smoothed_cross_entropy",
    "factorized-embed-activation-fn": "--encoder-factorized-embed-dim 64 --decoder-factorized-embed-dim 64",
    "decoder-factorized-embed-dim": "--encoder-factorized-embed-dim 64",
    **dict.fromkeys(("kd-args", "teacher-checkpoint-path"), "--criterion label_smoothed_cross_entropy_with_kd"),
    "rdrop-alpha": "--criterion label_smoothed_cross_entropy_with_rdrop",
    "sentencepiece-model": "--bpe sentencepiece",
    "wandb-run-name": "--wandb-project p",
    "keep-interval-updates": "--save-interval-updates 100",
    "tokens-per-sample": "--task language_modeling --arch transformer_lm",
    **dict.fromkeys(("insert", "rotate", "permute-sentences"), "--task denoising"),
    "mask": "--task denoising --mask-length span-poisson",
    "mask-length": "--task denoising --mask 0.3 --replace-length 0",
    "poisson-lambda": "--task denoising --mask 0.3 --mask-length span-poisson",
    **dict.fromkeys(("replace-length", "mask-random"), "--task denoising --mask 0.3 --mask-length word"),
    "decoder-normalize-before": "--encoder-normalize-before",
    "decoder-learned-pos": "--encoder-learned-pos",
    "decoder-use-rmsnorm": "--encoder-use-rmsnorm",
}
CHANGES_NOTHING = {
    *("decoder-normalize-before", "decoder-learned-pos", "decoder-use-rmsnorm", "decoder-factorized-embed-dim"),
    "maximize-best-checkpoint-metric",
}
"""Options with which a note goes away: that both sides differ, that the worst checkpoint was kept."""


MAPPED = [name.replace("_", "-") for name in OPTIONS if name not in ALIASES]


def with_option(name: str) -> str:
    option = name.replace("-", "_")
    bare = option in SWITCHES or (option in MAY_BE_BARE and name not in VALUES)
    return f"--{name}" if bare else f"--{name} {VALUES.get(name, '64')}"


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_every_option_that_is_read_changes_the_recipe_or_is_named(name: str, tmp_path: Path) -> None:
    context = CONTEXTS.get(name, "")
    before, after = text_of(context), text_of(f"{context} {with_option(name)}")
    assert before != after
    if yaml.safe_load(before) == yaml.safe_load(after) and name not in CHANGES_NOTHING:
        assert f"--{name}" in notes_of(f"{context} {with_option(name)}")
    recipe_of(f"{context} {with_option(name)}", tmp_path)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_every_option_without_a_counterpart_is_named_with_a_reason(name: str) -> None:
    words = with_option(name.replace("_", "-"))
    assert tree_of(words) == tree_of("")
    assert f"- {words}: {WITHOUT[name]}" in notes_of(words)


def test_unknown_options_and_what_has_no_effect_are_named() -> None:
    notes = notes_of("--frobnicate 3 --ema-decay 0.5")
    assert "Unknown, and not read:\n- --frobnicate 3" in notes
    assert "- --ema-decay 0.5: no effect together with the other options" in notes


def test_a_step_is_counted_in_tokens() -> None:
    words = "--update-freq 8 --distributed-world-size 4"
    assert tree_of(words)["batching"] == {"tokens_per_step": 131_072, "max_tokens": 4096}
    notes = notes_of(words)
    assert (
        "--max-tokens 4096, --update-freq 8, --distributed-world-size 4: batching.tokens_per_step = 4096 (max_tokens) x 8 "
        in notes
    )
    assert "x 4 (processes) = 131072 target tokens, whatever the number of processes now; fairseq counted padding" in notes
    assert "no --distributed-world-size: counted as 1 process" in notes_of("")
    sentences = BASE.replace("--max-tokens 4096", "--batch-size 64")
    assert tree_of("", sentences)["batching"] == {"tokens_per_step": 2048, "max_tokens": 2048}
    assert "--batch-size 64: batches are counted in tokens; 32 a sentence are assumed" in notes_of("", sentences)


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        ("", {"kind": "constant", "warmup_steps": 0, "warmup_init": 0.0}),
        ("--warmup-updates 50", {"kind": "constant", "warmup_steps": 50, "warmup_init": 1e-5}),
        ("--lr-scheduler inverse_sqrt", {"kind": "inverse_sqrt", "warmup_steps": 4000, "warmup_init": 0.0}),
        (
            "--lr-scheduler inverse_sqrt --warmup-updates 50 --warmup-init-lr 1e-07",
            {"kind": "inverse_sqrt", "warmup_steps": 50, "warmup_init": 1e-7},
        ),
        (
            "--lr-scheduler polynomial_decay --warmup-updates 10 --power 2 --end-learning-rate 1e-6",
            {"kind": "polynomial", "total_steps": 1000, "power": 2.0, "warmup_steps": 10, "final": 1e-6},
        ),
        (
            "--lr-scheduler cosine --warmup-updates 10 --min-lr 1e-6 --lr-period-updates 990",
            {"kind": "cosine", "total_steps": 1000, "warmup_steps": 10, "warmup_init": 0.0, "final": 1e-6},
        ),
        (
            "--lr-scheduler tri_stage --phase-ratio [0.1,0.4,0.5] --init-lr-scale 0.1 --final-lr-scale 0.2",
            {"kind": "wsd", "total_steps": 1000, "warmup_steps": 100, "warmup_init": 5e-5, "decay_steps": 500, "final": 1e-4},
        ),
    ],
)
def test_schedules(words: str, schedule: dict[str, Any], tmp_path: Path) -> None:
    assert tree_of(words)["schedule"] == pytest.approx(schedule)
    recipe_of(words, tmp_path)


def test_training_ends_where_the_schedule_does_or_somewhere() -> None:
    words = "--lr-scheduler polynomial_decay --total-num-update 500"
    assert tree_of(words)["training"]["max_steps"] == 500
    assert "--max-update 1000: beyond the schedule's 500 steps the rate stayed at its end" in notes_of(words)
    endless = BASE.replace(" --max-update 1000", "")
    assert tree_of("", endless)["training"]["max_epochs"] == 1000
    assert "fairseq trained without end" in notes_of("", endless)


ROTARY = {"kind": "rotary", "theta": 10000.0, "scaling": {"kind": "none"}}


@pytest.mark.parametrize(
    ("words", "position", "note"),
    [
        ("", {"kind": "sinusoidal"}, ""),
        ("--encoder-learned-pos --decoder-learned-pos", {"kind": "learned"}, ""),
        ("--no-token-positional-embeddings", {"kind": "none"}, ""),
        ("""--rope-args '{"type": "vanilla"}'""", ROTARY, "the embedding had positions as well; dstrain has one kind"),
        (
            """--no-token-positional-embeddings --rope-args '{"type": "linear", "scaling_factor": 4, "base": 500, "scale": 2}'""",
            {"kind": "rotary", "theta": 500.0, "scaling": {"kind": "linear", "factor": 4.0}},
            "--rope-args: decoded with every token at position 0",
        ),
        (
            """--rope-args '{"type": "dynamic", "scaling_factor": 4, "max_position_embeddings": 128}'""",
            {**ROTARY, "scaling": {"kind": "dynamic_ntk", "original_length": 128}},
            "type dynamic ignored scaling_factor",
        ),
        (
            """--rope-args '{"theta": 500, "scaling_factor": 2.0}'""",
            {"kind": "rotary", "theta": 500.0, "scaling": {"kind": "linear", "factor": 2.0}},
            "without `type` half of each head was rotated, in interleaved pairs",
        ),
        (
            """--yarn-args '{"type": "vanilla", "max_position_embeddings": 2048}'""",
            ROTARY,
            "for 2048 tokens set scaling: {kind: yarn, factor: 8, original_length: 256}",
        ),
        (
            """--yarn-args '{"type": "vanilla", "scale": 8, "beta_fast": 16, "beta_slow": 2, "attn_factor": 0.5}'""",
            {
                **ROTARY,
                "scaling": {
                    "kind": "yarn",
                    "factor": 8.0,
                    "original_length": 256,
                    "beta_fast": 16.0,
                    "beta_slow": 2.0,
                    "attention_factor": 0.5,
                },
            },
            "--yarn-args: decoded with every token at position 0",
        ),
        (
            """--yarn-args '{"type": "dynamic", "finetuned": true, "max_position_embeddings": 1024}'""",
            {**ROTARY, "scaling": {"kind": "dynamic_yarn", "factor": 4.0, "original_length": 256, "from_length": 1024}},
            "beta_slow was 2 if it was not given",
        ),
        (
            """--alibi-args '{"alibi_asymmetrical": "false"}'""",
            {"kind": "alibi", "encoder": "symmetric"},
            'string "false" counted',
        ),
        (
            """--alibi-args '{"alibi_asymmetrical": true}'""",
            {"kind": "alibi", "encoder": "asymmetric"},
            "the encoder had no bias",
        ),
        ("""--alibi-args '{"type": "asymmetrical"}'""", {"kind": "alibi", "encoder": "asymmetric"}, "the encoder had no bias"),
        ("--arch roformer_IT2", ROTARY, "this name gave no positions at all without --rope-args"),
        ("--arch aliformer_IT2", {"kind": "alibi", "encoder": "symmetric"}, "gave no positions at all without --alibi-args"),
        ("""--arch roformer_IT2 --alibi-args '{}'""", {"kind": "alibi", "encoder": "symmetric"}, ""),
    ],
)
def test_positions(words: str, position: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert tree_of(words)["model"]["position"] == position
    assert note in notes_of(words)
    recipe_of(words, tmp_path)


def test_one_side_may_be_factorized(tmp_path: Path) -> None:
    model = recipe_of("--decoder-factorized-embed-dim 64", tmp_path).model
    assert model.embedding.model_dump(include={"kind", "dim", "sides"}) == {"kind": "factorized", "dim": 64, "sides": "target"}
    notes = notes_of("--encoder-factorized-embed-dim 64 --decoder-factorized-embed-dim 32")
    assert "- --decoder-factorized-embed-dim = 32: differs from --encoder-factorized-embed-dim = 64: model.embedding.dim" in notes


def test_variants_of_the_model(tmp_path: Path) -> None:
    words = (
        "--encoder-recurrent-stacking 6 --decoder-recurrent-stacking 4 --encoder-factorized-embed-dim 64 "
        "--decoder-factorized-embed-dim 64 --factorized-embed-activation-fn relu --decoder-output-activation-fn tanh "
        "--encoder-use-glu --encoder-use-rmsnorm --decoder-use-rmsnorm --attn-implementation fast_gqa "
        "--encoder-kv-attention-heads 2 --no-scale-embedding --layernorm-embedding --share-decoder-input-output-embed "
        "--encoder-normalize-before --decoder-normalize-before --no-decoder-final-norm --encoder-layerdrop 0.2"
    )
    model = recipe_of(words, tmp_path).model
    assert model.kind == "encoder_decoder"
    assert (model.encoder.depth, model.encoder.unique_layers, model.encoder.num_kv_heads) == (6, 1, 2)
    assert (model.decoder.depth, model.decoder.unique_layers, model.decoder.output_activation) == (4, 1, "tanh")
    assert (model.encoder.feed_forward, model.decoder.feed_forward) == ("gated", "plain")
    assert (model.encoder.layer_drop, model.decoder.final_norm, model.norm.kind, model.norm_order) == (
        0.2,
        "no",
        "rms_norm",
        "pre",
    )
    assert model.embedding.model_dump() == {
        **{"kind": "factorized", "dim": 64, "activation": "relu", "scale": False, "norm": True, "tie": "decoder"},
        **{"output_dim": None, "sides": "both"},
    }
    assert "inert without" not in notes_of(words)
    assert "inert without --attn-implementation fast_gqa" in notes_of("--decoder-kv-attention-heads 4")


def test_sides_that_differ_are_named() -> None:
    words = "--decoder-embed-dim 256 --encoder-normalize-before --decoder-output-dim 128"
    assert tree_of(words)["model"]["model_dim"] == 512
    notes = notes_of(words)
    assert "- --decoder-embed-dim = 256: differs from --encoder-embed-dim = 512: model.model_dim is one number" in notes
    assert "- --decoder-normalize-before = False: differs from --encoder-normalize-before = True" in notes
    plain = {"kind": "plain", "scale": True, "norm": False, "tie": "none"}
    assert tree_of(words)["model"]["embedding"] == {**plain, "output_dim": 128}
    assert "--decoder-input-dim 128: translation models ignored it, and so does the recipe" in notes_of("--decoder-input-dim 128")
    narrow = "--task language_modeling --arch transformer_lm --decoder-input-dim 128 --decoder-output-dim 128"
    tied = tree_of(f"{narrow} --share-decoder-input-output-embed", BASE.replace("-s en -t de", ""))["model"]["embedding"]
    assert tied == {**plain, "kind": "factorized", "dim": 128, "activation": "linear", "tie": "decoder", "output_dim": 128}


def test_optimizer_precision_and_engine(tmp_path: Path) -> None:
    recipe = recipe_of(
        "--adam-betas '(0.9, 0.98)' --weight-decay 0.01 --clip-norm 1.0 --fp16 --ddp-backend fully_sharded --cpu-offload",
        tmp_path,
    )
    assert (recipe.optimizer.kind, recipe.optimizer.betas, recipe.optimizer.weight_decay) == ("adamw", (0.9, 0.98), 0.01)
    assert recipe.optimizer.decay == "all"
    assert (recipe.engine.precision, recipe.engine.clip_norm, recipe.engine.deepspeed) == ("fp16", 1.0, "zero3_offload")
    assert "meant a TPU until 2025" in notes_of("--bf16")


def test_validation_and_checkpoints(tmp_path: Path) -> None:
    recipe = recipe_of(
        """--eval-bleu --eval-bleu-args '{"beam": 4, "max_len_a": 1.2, "max_len_b": 10, "lenpen": 0.6}' --patience 5
        --best-checkpoint-metric bleu --maximize-best-checkpoint-metric --save-interval-updates 500 --keep-interval-updates 3
        --run-sanity-validation-steps --store-ema --ema-start-update 10 --tensorboard-logdir tb --wandb-project p""",
        tmp_path,
    )
    validation = recipe.validation
    assert (validation.unit, validation.every, validation.metric, validation.patience) == ("steps", 500, "bleu", 5)
    assert validation.run_sanity_validation
    assert validation.generation is not None
    assert (validation.generation.beam_size, validation.generation.length_penalty) == (4, 0.6)  # type: ignore[union-attr]
    assert (validation.generation.max_length_ratio, validation.generation.max_length_offset) == (1.2, 10)
    assert (recipe.checkpoint.unit, recipe.checkpoint.every, recipe.checkpoint.keep_bundles) == ("steps", 500, 3)
    assert recipe.training.ema is not None
    assert (recipe.training.ema.decay, recipe.training.ema.start_step) == (0.9999, 10)
    assert recipe.reporting.tensorboard
    assert recipe.reporting.wandb is not None
    worst = "--eval-bleu --best-checkpoint-metric bleu"
    assert "kept the worst, without --maximize-best-checkpoint-metric" in notes_of(worst)
    assert recipe_of("", tmp_path).validation.generation is None


def test_adapters(tmp_path: Path) -> None:
    given = {"r": 4, "alpha": 8, "rank_scaled": True, "target_modules": "q_proj, fc2", "bias": "lora_only", "x": 1}
    words = f"--lora-args '{json.dumps(given)}'"
    assert tree_of(words)["adapter"] == {
        **{"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "bias": "lora_only", "rank_scaled": True},
        "targets": ["q_proj", "down_proj"],
    }
    assert "--lora-args: key 'x'" in notes_of(words)
    recipe_of(words, tmp_path)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("q_proj", {"self_attention.q_proj", "cross_attention.q_proj"}),
        ("fc1,fc2", {"feed_forward.up_proj", "feed_forward.down_proj"}),
        ("kv_proj", {f"{side}_attention.{part}" for side in ("self", "cross") for part in ("k_proj", "v_proj")}),
        ("encoder_attn", {f"cross_attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")}),
        ("encoder_attn.q_proj", {"cross_attention.q_proj"}),
        ("qkv_proj", {f"{side}_attention.{block}_proj" for side in ("self", "cross") for block in "qkv"}),
        ("project_out_dim --decoder-output-dim 64", {"projection.output_proj"}),
        ("decoder.layers.1.fc1", {"feed_forward.up_proj"}),
        ("embed_tokens,output_projection", {"source_embedding.tokens", "target_embedding.tokens", "projection"}),
        ("up_gate_proj --encoder-use-glu --decoder-use-glu", {"feed_forward.up_proj", "feed_forward.gate_proj"}),
        (
            "emb,up --encoder-factorized-embed-dim 64 --decoder-factorized-embed-dim 64",
            {"tokens.table", "tokens.up_proj"},
        ),
    ],
)
def test_names_of_adapted_modules_are_found_in_the_model(names: str, parts: set[str], tmp_path: Path) -> None:
    modules, _, more = names.partition(" ")
    given = json.dumps({"r": 4, "target_modules": modules})
    recipe = recipe_of(f"{more} --lora-args '{given}'", tmp_path)
    assert recipe.adapter is not None
    with torch.device("meta"):
        model = build_model(recipe.model, VocabularySizes(source=64, target=64), projections="separate", seed=None)
    found = {place.path for place in select(adapter_targets(model), recipe.adapter.targets)}
    assert {".".join(path.split(".")[-2:]) for path in found} == parts
    assert all(path.startswith("decoder.layers.1.") for path in found) == modules.startswith("decoder.layers.1.")


def test_the_stable_optimizer(tmp_path: Path) -> None:
    assert recipe_of("--adam-stable", tmp_path).optimizer.kind == "stable_adamw"


def test_losses(tmp_path: Path) -> None:
    words = "--criterion label_smoothed_cross_entropy_with_rdrop --label-smoothing 0.1 --rdrop-alpha 5 --length-normalize-loss"
    objective = tree_of(words)["objective"]
    assert (objective["kind"], objective["label_smoothing"]) == ("cross_entropy", 0.1)
    assert (objective["average"], objective["r_drop"]) == ("sentences", {"alpha": 5.0})
    recipe_of(words, tmp_path)


KD = (
    "--task translation_with_kd --criterion label_smoothed_cross_entropy_with_kd --label-smoothing 0.1 "
    "--teacher-checkpoint-path t.pt"
)


@pytest.mark.parametrize(
    ("given", "selection"),
    [
        ("{}", {"kind": "word"}),
        ('{"strategy": "word_seq_level"}', {"kind": "word_and_sequence"}),
        ('{"strategy": "batch_level", "rate": 0.5}', {"kind": "batch", "rate": 0.5}),
        ('{"strategy": "global_level", "rate": 0.5}', {"kind": "global", "rate": 0.5, "queue_size": 10000}),
        (
            '{"strategy": "global_language_wise", "rate": 0.5, "queue_size": 99}',
            {"kind": "global_by_language", "rate": 0.5, "queue_size": 99, "tags": ["eng_Latn", "hin_Deva"]},
        ),
    ],
)
def test_distillation(given: str, selection: dict[str, Any], tmp_path: Path) -> None:
    words = f"{KD} --language-tags eng_Latn,hin_Deva --kd-args '{given}'"
    objective = tree_of(words)["objective"]
    assert objective["selection"] == selection
    assert objective["label_smoothing"] == (0.0 if selection["kind"] == "word" else 0.1)
    assert "--teacher-checkpoint-path t.pt: the teacher is a bundle" in notes_of(words)
    recipe_of(words, tmp_path)


def test_late_distillation_names_what_was_never_read(tmp_path: Path) -> None:
    words = """--criterion lm_distillation_loss --kd-args '{"strategy": "on_policy", "lambda": 0.75}'"""
    assert (tree_of(words)["objective"]["kd_weight"], tree_of(words)["objective"]["hard_weight"]) == (0.75, 0.25)
    assert "--kd-args: strategy was never read" in notes_of(words)
    recipe_of(words, tmp_path)
    alone = "--criterion lm_distillation_loss"
    assert tree_of(alone)["objective"]["selection"] == {"kind": "word"}
    recipe_of(alone, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arch transformer_bigger", r"--arch transformer_bigger is not known; did you mean transformer"),
        ("--activation-fn relu_squared", r"--activation-fn relu_squared: dstrain has no such activation; known are relu, gelu"),
        ("""--rope-args '{"type": "vanilla"}' --alibi-args '{}'""", r"--rope-args and --alibi-args exclude one another"),
        ("""--rope-args '{"type": "spiral"}'""", r"type 'spiral' is none of vanilla, linear, dynamic"),
        ("""--yarn-args '{"scale": 8}'""", r"type None is none of vanilla, dynamic"),
        ("""--lora-args '{"target_modules": "q_proj"}'""", r"r = 0 and target_modules = 'q_proj' make no adapter"),
        (f"""{KD} --kd-args '{{"strategy": "batch_level"}}'""", r"rate = 0 \(0 by default\) crashed batch_level"),
        (f"""{KD} --kd-args '{{"strategy": "sentence_level"}}'""", r"strategy 'sentence_level' is none of word_level"),
        (f"""{KD} --kd-args '{{"strategy": "global_language_wise", "rate": 0.5}}'""", r"needs --language-tags"),
        ("""--criterion lm_distillation_loss --kd-args '{"lambda": 0}'""", r"lambda = 0 is no share above 0"),
        ("--best-checkpoint-metric bleu", r"--best-checkpoint-metric bleu needs --eval-bleu"),
    ],
)
def test_what_fairseq_could_not_do_either_is_refused(words: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        recipe_from_command(f"{BASE} {words}")


def test_a_schedule_without_an_end_and_a_batch_without_a_size_are_refused() -> None:
    with pytest.raises(ImportFormatError, match=r"polynomial_decay has no end here; add --total-num-update or --max-update"):
        recipe_from_command(f"{BASE.replace('--max-update 1000', '')} --lr-scheduler polynomial_decay")
    with pytest.raises(ImportFormatError, match=r"neither --max-tokens nor --batch-size"):
        recipe_from_command(BASE.replace("--max-tokens 4096", ""))
    with pytest.raises(ImportFormatError, match=r"names no --arch; known are transformer"):
        recipe_from_command(BASE.replace("--arch transformer", ""))
    with pytest.raises(ImportFormatError, match=r"data-bin is not on this machine, so its languages are unknown"):
        recipe_from_command(BASE.replace("-s en -t de", ""))


def test_values_that_make_no_model_are_the_recipe_s_mistakes() -> None:
    with pytest.raises(RecipeError, match=r"num_heads = 8 does not divide model_dim = 100"):
        recipe_from_command(f"{BASE} --encoder-embed-dim 100")


def test_data_elsewhere_are_called_by_the_usual_names() -> None:
    data = tree_of("")["data"]
    assert data["train"] == [{"kind": "fairseq", "source": "data-bin/train.en-de.en", "target": "data-bin/train.en-de.de"}]
    assert data["tokenizer"] == {
        "kind": "fairseq_dictionaries",
        "source": "data-bin/dict.en.txt",
        "target": "data-bin/dict.de.txt",
    }
    assert "data-bin: not on this machine: the usual names, one piece a split" in notes_of("")
    several = BASE.replace("data-bin", "one:two")
    assert [corpus["source"] for corpus in tree_of("", several)["data"]["train"]] == ["one/train.en-de.en", "two/train.en-de.en"]
    assert "one:two: an epoch read one of them in turn; dstrain's epoch reads all" in notes_of("", several)
    limits = tree_of("--max-source-positions 256 --max-tokens 300")["data"]["filter"]
    assert limits == {"max_source_length": 256, "max_target_length": 300}
    assert tree_of("--truncate-source")["data"]["filter"]["long_sources"] == "truncate"
    assert "--truncate-source: no effect together with the other options" in notes_of("--truncate-source", LM)


@needs_golden
def test_data_at_hand_are_looked_at() -> None:
    folder = GOLDEN / "data/bin_sep"
    data = tree_of("", BASE.replace("data-bin -s en -t de", str(folder)))["data"]
    assert data["valid"] == [{"kind": "fairseq", "source": f"{folder}/valid.en-de.en", "target": f"{folder}/valid.en-de.de"}]
    assert list(data["test"]) == ["test"]


LM = BASE.replace("transformer", "transformer_lm_gpt2_small").replace("-s en -t de", "--task language_modeling")


def test_language_models_read_text_without_a_source(tmp_path: Path) -> None:
    recipe = recipe_of("--tokens-per-sample 512 --share-decoder-input-output-embed", tmp_path, LM)
    assert recipe.model.kind == "decoder_only"
    assert (recipe.model.max_target_length, recipe.model.embedding.tie, recipe.model.norm_order) == (512, "decoder", "pre")
    assert tree_of("", LM.replace("_gpt2_small", ""))["model"]["norm_order"] == "post"
    data = tree_of("", LM)["data"]
    assert data["train"] == [{"kind": "fairseq_text", "path": "data-bin/train"}]
    assert data["tokenizer"] == {"kind": "fairseq_dictionaries", "source": "data-bin/dict.txt"}
    assert data["filter"] == {"max_target_length": 1024}
    assert "--task language_modeling: an example is a line of the text, not a block" in notes_of("", LM)


@needs_golden
def test_text_at_hand_is_looked_at(tmp_path: Path) -> None:
    recipe = recipe_of("", tmp_path, LM.replace("data-bin", str(GOLDEN / "data/bin_lm")))
    assert list(recipe.data.test) == ["test"]


DENOISING = (
    "--task denoising --mask 0.3 --mask-random 0.1 --mask-length span-poisson --poisson-lambda 3.5 --replace-length 1 "
    "--permute-sentences 1 --rotate 0 --permute 0.5"
)


def test_denoising_is_a_task_of_text(tmp_path: Path) -> None:
    base = BASE.replace("--arch transformer", "--arch bart_base").replace(" -s en -t de", "")
    data = tree_of(DENOISING, base)["data"]
    task = {
        "kind": "denoising",
        "permute_sentences": 1.0,
        "mask": 0.3,
        "unit": "word",
        "poisson_lambda": 3.5,
        "replace": "span",
        "insert": 0.0,
        "rotate": 0.0,
        "random": 0.1,
    }
    assert data["train"] == [{"kind": "fairseq_text", "path": "data-bin/train", "task": task}]
    assert data["valid"] == [{"kind": "fairseq_text", "path": "data-bin/valid", "task": task}]
    assert data["tokenizer"] == {"kind": "fairseq_dictionaries", "source": "data-bin/dict.txt"}
    assert recipe_of(DENOISING, tmp_path, base).model.kind == "encoder_decoder"
    notes = notes_of(DENOISING, base)
    assert "--permute-sentences 1: permuted nothing without --bpe gpt2, for no sentence had an end" in notes
    assert "--mask 0.3: rounded the number of masked words up, and spans overlapped, so that fewer were masked" in notes
    assert "--task denoising: the task appended <mask> to the dictionary; append the line `<mask> 0` to dict.txt" in notes
    assert "--permute 0.5: fairseq never read it" in notes
    assert "no --rotate: fairseq rotated half of the texts" in notes_of("--task denoising", base)
    assert tree_of("--task denoising", base)["data"]["train"][0]["task"]["rotate"] == 0.5
    of_gpt2 = tree_of(f"{DENOISING} --bpe gpt2", base)["data"]["train"][0]["task"]
    assert of_gpt2 == {**task, "sentence_ends": ["13"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask-length span", "--mask-length span: it is none of subword, word, span-poisson; fix the command line"),
        ("--replace-length 2", "--replace-length 2: fairseq takes 0 or 1, and -1 unless --mask-length is subword"),
        ("--mask 0.3", "--replace-length -1: fairseq takes 0 or 1, and -1 unless --mask-length is subword"),
    ],
)
def test_denoising_options_that_fairseq_refuses(words: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        text_of(f"--task denoising {words}")


def test_other_tasks_ask_for_pairs(tmp_path: Path) -> None:
    assert "--task masked_lm: dstrain's data are pairs, or text" in notes_of("--task masked_lm")
    recipe_of("--task masked_lm --arch bart_base", tmp_path)
