"""From a recipe to estimates: of the recipe as it is, and of the layout that is recommended for a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from dstrain.arguments import CheckedOptions, require_type
from dstrain.build.training_options import TeacherOptions
from dstrain.build.training_plan import TrainingPlan
from dstrain.checkpoint.bundle import find_bundle
from dstrain.config_base import Precision
from dstrain.data.config import gives_sources, has_no_source
from dstrain.data.prepared.location import DataDirectory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.engine.ds_config import ModelSize
from dstrain.errors import ArgumentError, RecipeError
from dstrain.estimate.parameters import count_parameters
from dstrain.estimate.planner import USABLE, Estimate, estimate_layout, recommend
from dstrain.estimate.report import describe_estimates, memory_line, shown_gib
from dstrain.estimate.workload import (
    Cluster,
    DeviceKind,
    LossKind,
    ParallelLayout,
    Rates,
    Sharding,
    TeacherModel,
    Workload,
)
from dstrain.log import log_fields, logger
from dstrain.models.config import VocabularySizes
from dstrain.parallel.launch_environment import rank_from_environment
from dstrain.parallel.mesh import Mesh, crossing_warning
from dstrain.recipe import Recipe

GEMM_TFLOPS = {"fp32": 50.0, "bf16": 600.0, "fp16": 600.0}
"""What large products of an H100 reach, in 10^12 operations a second, by precision."""
SAMPLED_EXAMPLES = 100_000
"""Of the training data, whose lengths stand for all."""
SENTENCE = 32
"""Tokens of a sentence if no data says how many."""
Positive = Annotated[float, Field(gt=0)]


class SentenceLengths(NamedTuple):
    """Tokens of a usual sentence, EOS included. A language model has sources of one token."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(CheckedOptions):
    """The options of `dstrain estimate`. gpu_memory: GiB of one GPU. data: gives vocabulary and lengths, None for the next two.

    vocab_size: None for the recipe's tokenizer. length: tokens of a sentence, None for 32, or the longest kept text without a
    source; a side has at most what `data.filter` keeps of it. gemm_tflops: None by precision. The bandwidths are in GB/s, of
    links in one direction.
    """

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    gpu_memory: PositiveFloat = 80.0
    data: DataDirectory | None = None
    vocab_size: PositiveInt | None = None
    length: PositiveInt | None = None
    teachers: TeacherOptions = field(default_factory=TeacherOptions)
    gemm_tflops: PositiveFloat | None = None
    memory_bandwidth: PositiveFloat = 2700.0
    node_bandwidth: PositiveFloat = 360.0
    network_bandwidth: PositiveFloat = 40.0

    def cluster(self, precision: Precision) -> Cluster:
        """The machines."""
        rates = Rates(
            gemm=1e12 * (self.gemm_tflops or GEMM_TFLOPS[precision]),
            memory=1e9 * self.memory_bandwidth,
            intra_node=1e9 * self.node_bandwidth,
            inter_node=1e9 * self.network_bandwidth,
        )
        return Cluster(self.nodes, self.gpus_per_node, int(2**30 * self.gpu_memory), rates)


@dataclass(frozen=True)
class Estimates:
    """recipe: as it is. recommended: None if nothing fits, for the reason `problem`."""

    cluster: Cluster
    recipe: Estimate
    recommended: Estimate | None
    problem: str | None

    def __str__(self) -> str:
        """All figures, for people."""
        work, size, rates = self.recipe.workload, self.recipe.parameters, self.cluster.rates
        columns = {"recipe": self.recipe} | ({} if self.recommended is None else {"recommended": self.recommended})
        head = [
            f"{work.model.kind}, {whole_parameters(work):,} parameters, {size.trained / size.total:.1%} of them trained, "
            f"{work.precision}; vocabulary {work.vocabulary.source:,} + {work.vocabulary.target:,}",
            f"steps of {work.tokens_per_step:,} target tokens, sentences of {work.source_length} + {work.target_length} tokens",
            f"rates, stated and not measured: {rates.gemm / 1e12:g} TFLOP/s in products, {rates.memory / 1e9:,g} GB/s of memory, "
            f"{rates.intra_node / 1e9:g} GB/s in a node, {rates.inter_node / 1e9:g} GB/s between nodes",
        ]
        return "\n".join([*head, "", describe_estimates(columns, self.cluster), "", self._conclusion()])

    def _conclusion(self) -> str:
        if self.recommended is None:
            return f"recommended: none; {self.problem}"
        layout = self.recommended.layout
        changes = {
            "engine.parallel.tensor": layout.tensor,
            "engine.parallel.sequence": layout.sequence,
            "engine.deepspeed": layout.sharding.name,
            "engine.activation_checkpointing": layout.checkpointing,
            "batching.max_tokens": layout.max_tokens,
        }
        return "recommended: " + " ".join(f"--set {key}={value}" for key, value in changes.items())


def whole_parameters(workload: Workload) -> int:
    """Parameters of the model and its adapter, over all tensor ranks."""
    return count_parameters(workload.model, workload.vocabulary, adapter=workload.adapter).total


def estimate(recipe: Recipe, options: EstimateOptions) -> Estimates:
    """What a training of `recipe` needs on a cluster, and a layout for it; nothing is loaded, and no tensor is made.

    Raises a DstrainError if the vocabulary is not known, or the recipe's layout does not divide the cluster.

    >>> from dstrain.api import EstimateOptions, estimate, load_recipe
    >>> found = estimate(load_recipe("tiny.yaml"), EstimateOptions(nodes=1, gpus_per_node=2, gpu_memory=80))
    >>> found.recommended.memory.fits(80 * 2**30)
    True
    """
    require_type("recipe", recipe, Recipe, "; read one by load_recipe(name or file)")
    require_type("options", options, EstimateOptions)
    cluster, parallel = options.cluster(recipe.engine.precision), recipe.engine.parallel
    if cluster.ranks % (parallel.tensor * parallel.sequence):
        raise RecipeError(
            f"engine.parallel: tensor = {parallel.tensor} times sequence = {parallel.sequence} does not divide the "
            f"{cluster.ranks} GPUs of --nodes {options.nodes} --gpus-per-node {options.gpus_per_node}; choose other numbers"
        )
    if warning := crossing_warning(parallel.tensor, options.gpus_per_node):
        logger.warning("%s", warning)
    workload = workload_of(recipe, _vocabulary(recipe, options), _lengths(recipe, options), _teachers(options.teachers, recipe))
    sizes = count_parameters(workload.model, workload.vocabulary, tensor=parallel.tensor, adapter=workload.adapter)
    layout = layout_of(recipe, sizes.model_size, ranks=cluster.ranks, device="cuda")
    own = estimate_layout(workload, layout, parameters=sizes, cluster=cluster)
    try:
        return Estimates(cluster, own, recommend(workload, recipe.engine, cluster), None)
    except RecipeError as error:
        return Estimates(cluster, own, None, str(error))


def workload_of(
    recipe: Recipe, vocabulary: VocabularySizes, lengths: SentenceLengths, teachers: Sequence[TeacherModel]
) -> Workload:
    """What the recipe trains. A distillation without teachers reads a sparse store."""
    needs, optimizer = recipe.objective.needs, recipe.optimizer
    loss: LossKind = "cross_entropy"
    if needs.teacher is not None:
        loss = "dense_distillation" if teachers else "sparse_distillation"
    elif needs.passes == 2:
        loss = "r_drop"
    return Workload(
        model=recipe.model,
        vocabulary=vocabulary,
        precision=recipe.engine.precision,
        loss=loss,
        chunk_tokens=needs.chunk_tokens,
        tokens_per_step=recipe.batching.tokens_per_step,
        source_length=lengths.source,
        target_length=lengths.target,
        longest_row=longest_row(recipe),
        adapter=recipe.adapter,
        ema=recipe.training.ema is not None,
        decay_groups=optimizer.weight_decay > 0 and optimizer.decay == "matrices",
        teachers=tuple(teachers),
    )


def longest_row(recipe: Recipe) -> int:
    """Padded tokens of the longest example that the recipe keeps; a micro-batch must hold it."""
    kept, limits, packing = recipe.data.filter, recipe.model.limits, recipe.batching.packing
    if packing is not None:
        return packing.block_size
    source, target = min(kept.max_source_length, limits.source), min(kept.max_target_length, limits.target)
    if has_no_source(recipe.data.train):
        return target
    return min(source + target - 1, limits.target) if limits.joint else max(source, target)


def layout_of(recipe: Recipe, size: ModelSize, *, ranks: int, device: DeviceKind) -> ParallelLayout:
    """The recipe's own, on so many ranks. size: of the model, or of a rank's slice of it."""
    engine = recipe.engine
    return ParallelLayout(
        ranks=ranks,
        tensor=engine.parallel.tensor,
        sequence=engine.parallel.sequence,
        max_tokens=recipe.batching.max_tokens,
        checkpointing=engine.activation_checkpointing,
        sharding=Sharding.of(engine, replicas=ranks // engine.parallel.tensor, size=size),
        device=device,
        packed=recipe.packs(device),
        tiles=engine.feed_forward_tiles,
    )


def _vocabulary(recipe: Recipe, options: EstimateOptions) -> VocabularySizes:
    if options.data is not None and options.vocab_size is not None:
        raise ArgumentError("--vocab-size says what --data knows: leave one of them out")
    if options.data is not None:
        load_manifest(options.data)
        tokenizers = load_tokenizers(options.data / "tokenizer")
        return VocabularySizes.of(tokenizers.source, tokenizers.target)
    tokenizer, entries = recipe.data.tokenizer, options.vocab_size
    if entries is None and isinstance(tokenizer, TrainedSentencePiece):
        entries = tokenizer.vocab_size
    if entries is None:
        raise RecipeError(
            f"data.tokenizer.kind = {tokenizer.kind} does not say how many entries the vocabulary has; give --data DATA, which "
            "`dstrain prepare` wrote, or --vocab-size N"
        )
    return VocabularySizes(source=entries, target=entries)


def _lengths(recipe: Recipe, options: EstimateOptions) -> SentenceLengths:
    text_only, noised = has_no_source(recipe.data.train), any(map(gives_sources, recipe.data.train))
    if recipe.batching.packing is not None and options.length is None:
        return SentenceLengths(1, recipe.batching.packing.block_size)
    if options.data is not None and options.length is None:
        split = load_manifest(options.data).require_split("train", options.data)
        rows = max(split.rows, 1)
        source, target = (max(1, tokens // rows) for tokens in (split.source_tokens, split.target_tokens))
        return SentenceLengths(target if text_only and noised else source, target)
    kept = recipe.data.filter
    longest = kept.max_target_length if text_only else max(kept.max_source_length, kept.max_target_length)
    if options.length is not None and options.length > longest:
        raise RecipeError(
            f"--length {options.length} is longer than the text that data.filter keeps, {longest} tokens at most; lower it, or "
            "raise data.filter.max_source_length and max_target_length"
        )
    length = options.length or (longest if text_only else SENTENCE)
    source = length if text_only else min(length, kept.max_source_length)
    return SentenceLengths(source if noised else 1, min(length, kept.max_target_length))


def _teachers(options: TeacherOptions, recipe: Recipe) -> list[TeacherModel]:
    if options.bundles and recipe.objective.needs.teacher is None:
        raise RecipeError(f"objective.kind = {recipe.objective.kind} has no use for a teacher: leave --teacher out")
    if options.placement is not None and not options.bundles:
        raise RecipeError("--teacher-placement says how a teacher works: add --teacher BUNDLE, or leave it out")
    needs, placement = recipe.objective.needs.teacher, options.placement or "sharded"
    precision = (needs and needs.precision) or recipe.engine.precision
    descriptions = [find_bundle(bundle).description for bundle in options.bundles]
    return [TeacherModel(each.model, each.vocabulary, precision, placement) for each in descriptions]


def log_memory(plan: TrainingPlan, teachers: TeacherOptions, mesh: Mesh) -> None:
    """Say on rank 0 how much memory a rank of a training will take, and warn if its device has less.

    Teachers count with the student's vocabulary. Every rank calls it: a recipe that makes no model is an error on all.
    """
    recipe, vocabulary = plan.recipe, plan.data.vocabulary
    lengths = [max(1, round(float(each.mean()))) for each in plan.steps.sample(SAMPLED_EXAMPLES)]
    needs, placement = recipe.objective.needs.teacher, teachers.placement or "sharded"
    precision = (needs and needs.precision) or recipe.engine.precision
    online = [TeacherModel(model, vocabulary, precision, placement) for model in plan.objective.models]
    workload = workload_of(recipe, vocabulary, SentenceLengths(*lengths), online)
    device: DeviceKind = "cuda" if mesh.device.type == "cuda" else "cpu"
    sizes = count_parameters(recipe.model, vocabulary, tensor=mesh.tensor.size, adapter=recipe.adapter)
    layout = layout_of(recipe, sizes.model_size, ranks=mesh.world.size, device=device)
    memory = estimate_layout(workload, layout, parameters=sizes).memory
    if mesh.world.rank > 0:
        return
    log_fields({"memory": memory_line(memory)})
    needed, capacity = memory.total + (memory.host if device == "cpu" else 0), device_memory(mesh.device)
    if needed > USABLE * capacity:
        logger.warning(
            "a rank needs about %s GiB, and %s has %s: lower batching.max_tokens = %s, set engine.activation_checkpointing: full "
            "or another engine.deepspeed, or start more ranks; `dstrain estimate` recommends a layout",
            shown_gib(needed),
            "its GPU" if device == "cuda" else "its share of the machine",
            shown_gib(capacity),
            layout.max_tokens,
        )


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU; on a CPU, the machine's divided by the ranks on it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // int(rank_from_environment(os.environ)["LOCAL_WORLD_SIZE"])
