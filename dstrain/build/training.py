"""From a recipe to a running training.

Cheap checks come first: recipe, DeepSpeed file, data, teachers and run directory are checked before a model is built.
"""

from __future__ import annotations

from functools import partial

from dstrain import __version__
from dstrain.arguments import require_type
from dstrain.build.base import build_on_base, check_reloaded
from dstrain.build.estimate import log_memory
from dstrain.build.machine import describe_device, unused_gpus
from dstrain.build.same_data import moved_text
from dstrain.build.training_options import TrainOptions
from dstrain.build.training_plan import TrainingPlan, plan_training
from dstrain.checkpoint.bundle import StoredBundle
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.checkpoint.template import BundleTemplate
from dstrain.config_base import upgrade_config
from dstrain.data.batching.loader import Steps
from dstrain.distillation.on_policy import OnPolicySteps, OwnSamples, max_sample_length
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.engine.launch import import_deepspeed, require_compiler
from dstrain.engine.training_engine import TrainEngine
from dstrain.errors import TrainingError
from dstrain.evaluation.translation import build_translation
from dstrain.evaluation.validator import Validator
from dstrain.generation.constraints import SpecialIds
from dstrain.log import log_fields, logger
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model, initial_values
from dstrain.models.weights import parameter_layouts
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.objective import Objective
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.kernels import PACKED_ALIBI_ATTENTION, compiled_kernels, kernels_by_name, kernels_in_use
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.parallel.mesh import Mesh, build_mesh, finalize
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.bundles import BundleStore
from dstrain.training.config import ReportingConfig
from dstrain.training.preemption import StopSignals
from dstrain.training.rank_agreement import require_agreement
from dstrain.training.reporting import build_reporter
from dstrain.training.run_directory import Run, open_run
from dstrain.training.trackers import usable_trackers
from dstrain.training.trainer import Trainer
from dstrain.training.watchdog import Watchdog


def train(recipe: Recipe, options: TrainOptions) -> int:
    """Train `recipe` into a run directory, or resume its run.

    Returns the exit code of `dstrain train`, 0 for finished. Raises a DstrainError if something does not fit together.

    >>> from pathlib import Path
    >>> from dstrain.api import TrainOptions, load_recipe, train
    >>> recipe = load_recipe("tiny.yaml", ["training.max_steps=30"])
    >>> train(recipe, TrainOptions(data=Path("data"), output=Path("run"), device="cpu"))
    0
    """
    require_type("recipe", recipe, Recipe, "; read one by load_recipe(name or file)")
    require_type("options", options, TrainOptions)
    mesh = build_mesh(options.device, tensor=recipe.engine.parallel.tensor, sequence=recipe.engine.parallel.sequence)
    reporting = usable_trackers(recipe.reporting) if mesh.world.rank == 0 else recipe.reporting
    prepare = partial(plan_training, recipe, options, replicas=mesh.replicas.size)
    plan = raise_on_all_ranks(mesh.world, TrainingError, "starting", prepare)
    compiler = partial(require_compiler, _compiled(plan.recipe, mesh.device.type), mesh.device.type)
    raise_on_all_ranks(mesh.world, TrainingError, "finding a compiler", compiler)
    raise_on_all_ranks(mesh.world, TrainingError, "importing DeepSpeed", partial(import_deepspeed, mesh.device.type))
    require_agreement(mesh.world, plan.decisive(options))
    dtype = COMPUTE_DTYPES[recipe.engine.precision]
    choose = partial(kernels_by_name, recipe.engine.kernels.by_name, mesh.device.type, dtype)
    with raise_on_all_ranks(mesh.world, TrainingError, "choosing kernels", choose):
        return _train(plan, options, mesh, reporting)


def _compiled(recipe: Recipe, device: str) -> dict[str, str]:
    """The settings of `engine` whose code is compiled at run time, each with one that is not. "key = value" -> "key: value" """
    mode, model = recipe.engine.compile, recipe.model
    compiled = {} if mode == "none" else {f"compile = {mode}": "compile: none"}
    if device == "cuda":  # a CPU runs kernels of Triton by its interpreter
        packs_alibi = model.position.kind == "alibi" and recipe.packs("cuda") and model.attention_dropout == 0
        unasked = [PACKED_ALIBI_ATTENTION.name] if packs_alibi else []
        kernels = compiled_kernels(recipe.engine.kernels.by_name, unasked, device, COMPUTE_DTYPES[recipe.engine.precision])
        compiled |= {f"kernels.{kernel}": f"kernels.{plain}" for kernel, plain in kernels.items()}
    return compiled


def _train(plan: TrainingPlan, options: TrainOptions, mesh: Mesh, reporting: ReportingConfig) -> int:
    recipe = plan.recipe
    if mesh.world.rank == 0:
        log_plan(plan, mesh)
    log_memory(plan, options.teachers, mesh)
    if mesh.world.rank == 0:
        for warning in filter(None, [*plan.horizons.warnings(), unused_gpus(mesh.device, options.device)]):
            logger.warning("%s", warning)
    run = open_run(
        options.output,
        recipe_tree(recipe),
        mesh.world,
        data=plan.data.manifest.content,
        preparation=plan.data.manifest.job,
        teachers=plan.objective.teachers,
        upgrade=partial(upgrade_config, Recipe),
        accept=options.accept_changes,
    )
    try:
        engine = build_engine(recipe, plan.data.vocabulary, mesh, plan.objective.build(mesh), plan.base)
        training = Training(plan, run, engine, reporting)
        code = training.trainer().run()
        if code == 0 and recipe.adapter is not None:
            training.check_last_bundle()
    finally:
        run.close()
    engine.close()
    finalize()  # in order only after a success: after a failure the other ranks may be inside a collective
    return code


def log_plan(plan: TrainingPlan, mesh: Mesh) -> None:
    """Log where and on what a training runs."""
    engine = plan.recipe.engine
    moved = moved_text(plan.recipe, plan.data.manifest)
    targets = plan.data.train_examples.lengths.num_targets(1)
    log_fields(
        {
            "device": describe_device(mesh.device),
            "kernels": kernels_in_use(mesh.device.type, COMPUTE_DTYPES[engine.precision], engine.kernels.by_name),
            "train": f"{len(plan.data.train):,} examples, {targets:,} target tokens",
            "blocks": plan.data.blocks and plan.data.blocks.describe(),
            "epoch": f"about {plan.horizons.steps_per_epoch:,} steps",
            "valid": f"{len(plan.data.valid):,} examples",
            "text": moved and f"elsewhere than when it was prepared: {moved}",
        }
    )


def log_model(model: Model, config: ModelConfig) -> None:
    """Log the model and its size."""
    layouts = parameter_layouts(model)
    sizes = [(layouts[name].numel, parameter.requires_grad) for name, parameter in model.named_parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    layers = f"{config.encoder.depth} + {config.decoder.depth}" if config.kind == "encoder_decoder" else f"{config.decoder.depth}"
    share = "" if trained == total else f", {trained:,} of them are trained"
    log_fields({"model": f"{config.kind}, {layers} layers, width {config.model_dim}", "size": f"{total:,} parameters{share}"})


def build_engine(
    recipe: Recipe, vocabulary: VocabularySizes, mesh: Mesh, objective: Objective, base: StoredBundle | None = None
) -> TrainEngine:
    """Model and objective under the engine, with the base's weights, or initial ones from the seed.

    Raises RecipeError for an adapter that does not suit the model.
    """
    seed, tensor, sequence = recipe.training.seed, mesh.tensor, mesh.sequence
    if base is not None:
        model, weights = build_on_base(base, recipe.model, recipe.adapter, seed=seed, tensor=tensor, sequence=sequence)
    else:
        model = build_model(recipe.model, vocabulary, seed=None, tensor=tensor, sequence=sequence)
        weights = initial_values(model, vocabulary, seed)
    if mesh.world.rank == 0:
        log_model(model, recipe.model)
    return TrainEngine(
        TrainModule(model, objective, CrossEntropy(recipe.objective.validation)),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        engine=recipe.engine,
        ema=recipe.training.ema,
        seed=seed,
        mesh=mesh,
        weights=weights,
        base=None if base is None else base.fingerprint,
    )


class Training:
    """The parts of one training, put together. reporting: the recipe's, without the trackers that cannot start."""

    def __init__(self, plan: TrainingPlan, run: Run, engine: TrainEngine, reporting: ReportingConfig) -> None:
        self.plan = plan
        self.reporting = reporting
        self.recipe = recipe = plan.recipe
        self.data = plan.data
        self.run = run
        self.engine = engine
        self.mesh = engine.mesh
        self.collator = plan.data.collator("train", recipe, self.mesh, plan.objective.models)
        self.averaged = recipe.training.ema is not None
        adapter = None if recipe.adapter is None or plan.base is None else (recipe.adapter, plan.base)
        self.template = BundleTemplate(recipe.model, plan.data.vocabulary, plan.data.tokenizers, recipe_tree(recipe), adapter)
        self.watchdog = Watchdog(recipe.training.hang_seconds, rank=self.mesh.world.rank)

    def trainer(self) -> Trainer:
        """The loop over the steps."""
        recipe, run, world = self.recipe, self.run, self.mesh.world
        return Trainer(
            training=recipe.training,
            validation=recipe.validation,
            checkpoint=recipe.checkpoint,
            reporting=self.reporting,
            ranks=world,
            engine=self.engine,
            steps=partial(self._steps, self._own_samples()),
            validate=self._validator(),
            checkpoints=CheckpointManager(
                run.checkpoints,
                world,
                keep=recipe.checkpoint.keep_checkpoints,
                run_id=run.run_id,
                template=self.template.write,
            ),
            bundles=self._bundles(),
            reporter=build_reporter(
                run.directory, self.reporting, rank=world.rank, total_steps=self.plan.horizons.steps, run_id=run.run_id
            ),
            signals=StopSignals(),
            watchdog=self.watchdog,
            header={"dstrain": __version__, "run_id": run.run_id, "recipe": recipe_tree(recipe)},
            changes=run.changes,
        )

    def _steps(self, own_samples: OwnSamples | None, epoch: int, index: int) -> Steps:
        loader = self.data.train_loader(self.plan.steps, self.collator, self.mesh, epoch, index)
        return loader if own_samples is None else OnPolicySteps(loader, own_samples)

    def _own_samples(self) -> OwnSamples | None:
        """The writer of targets for on-policy steps, if the objective needs any."""
        recipe, data = self.recipe, self.data
        if (samples := recipe.objective.needs.samples) is None:
            return None
        return OwnSamples(
            config=samples,
            student=lambda: self.engine.generation_model(averaged=False),
            ranks=self.mesh.data,
            sequence=self.mesh.sequence,
            ids=SpecialIds.of(data.tokenizers.target),
            max_length=max_sample_length(
                [model.limits for model in (recipe.model, *self.plan.objective.models)],
                longest_source=data.train_examples.lengths.longest("source").tokens,
                max_tokens=recipe.batching.max_tokens,
            ),
            collator=self.collator,
            max_tokens=recipe.batching.max_tokens,
            seed=recipe.training.seed,
            device=self.engine.device,
            beat=self.watchdog.beat,
        )

    def _validator(self) -> Validator:
        recipe, data, mesh = self.recipe, self.data, self.mesh
        chosen = recipe.validation
        translation = build_translation(
            chosen.generation,
            recipe.model,
            data.valid,
            data.tokenizers,
            mesh,
            corpora=data.corpora("valid"),
            tokenize=chosen.tokenize,
            lowercase=chosen.lowercase,
            rouge=chosen.rouge,
        )
        if translation is not None:
            signatures = translation.signatures()
            log_fields({name: signatures[name] for name in ("bleu", "chrf", "rouge_l") if name in signatures})
        return Validator(
            self.engine,
            replicas=mesh.replicas,
            data=mesh.data,
            batches=lambda: data.valid_batches(recipe, mesh),
            denominator=self.engine.module.validation.denominator,
            averaged=self.averaged,
            translation=translation,
            num_examples=len(data.valid),
            beat=self.watchdog.beat,
        )

    def _bundles(self) -> BundleStore:
        return BundleStore(
            self.run.bundles,
            self.mesh.world,
            gather=lambda: self.engine.gather_weights(averaged=self.averaged),
            save=self.template.save,
            keep=self.recipe.checkpoint.keep_bundles,
        )

    def check_last_bundle(self) -> None:
        """Compare the last bundle, read back, with the trained weights. Collective."""
        check_reloaded(
            self.run.bundles / "last",
            self.engine,
            next(self.data.valid_batches(self.recipe, self.mesh)),
            self.mesh,
            averaged=self.averaged,
            tolerance=1e-4 if self.recipe.engine.precision == "fp32" else 0.05,
        )
