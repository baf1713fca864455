"""The same for what shows only deeper than the command line: the call fails, the remedy is followed, the call succeeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.build.base import find_base
from dstrain.build.teachers import open_logits, plan_teachers, read_vocabulary_map
from dstrain.build.training_options import TeacherOptions, TrainOptions, check_training
from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.cli.main import main
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import BatchingConfig, HuggingFaceDataset
from dstrain.data.lengths import StoredLengths
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.prepared.shard import read_shard
from dstrain.data.sources.records import RecordReader
from dstrain.data.sources.tables import load_data_set
from dstrain.data.sources.text import BlockReader, read_lines
from dstrain.data.tags import locate_tags
from dstrain.data.tasks.build import build_task
from dstrain.data.tasks.config import SpanCorruption
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, load_tokenizers
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.store.dump import plan_dump
from dstrain.distillation.store.manifest import DenseMethod, SampleMethod, load_store_manifest
from dstrain.engine.launch import require_compiler, require_precision
from dstrain.errors import DstrainError
from dstrain.evaluation.validator import check_split
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, read_dictionaries
from dstrain.interop.fairseq.command_line.convert import recipe_from_command
from dstrain.models.config import PlainEmbedding, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.parallel.mesh import build_mesh
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe
from dstrain.training.run_directory import open_run
from tests.unit.cli.remedy_messages import pattern
from tests.unit.cli.remedy_workspace import PREPARE
from tests.unit.data.corpus import data_config
from tests.unit.data.fairseq_files import write_dictionary, write_mmap, write_pairs
from tests.unit.data.task_texts import dictionary
from tests.unit.distillation.test_features import DECODER_ONLY, STUDENT, TEACHER, config_of, feature, objective_of
from tests.unit.distillation.toy_store import MODEL
from tests.unit.interop.test_convert import KD
from tests.unit.models.build import small_config, small_model
from tests.unit.training.fakes import ONE_PROCESS

Call = Callable[[], object]
DISTILLATION = "objective={kind: distillation}"
ADAPTER = "adapter={rank: 2, alpha: 4, targets: [q_proj]}"
FAIRSEQ = "fairseq-train data-bin -s en -t de --arch transformer --optimizer adam --lr 0.0005 --max-tokens 4096 --max-update 1000"
ROWS = [[4, 5, 2], [6, 2]]


@dataclass(frozen=True)
class Case:
    """`fails` raises `message`; every one of `follows` is what it says to do."""

    message: str
    fails: Call
    follows: tuple[Call, ...]


def case(message: str, fails: Call, *follows: Call) -> Case:
    return Case(message, fails, follows)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", overrides)


def checked(*overrides: str, data: str = "data", output: str = "new", accept: tuple[str, ...] = (), **options: Any) -> Call:
    """The checks of `dstrain train` on the workspace's data. options: those of teachers, and base."""
    base = options.pop("base", None)

    def check() -> None:
        teachers = TeacherOptions(**options)
        check_training(
            recipe(*overrides),
            TrainOptions(data=Path(data), output=Path(output), base=base, teachers=teachers, accept_changes=accept),
        )

    return check


def lora(**keys: Any) -> Call:
    """An adapter over a model without biases in its norms."""

    def build() -> None:
        model = small_model(small_config())
        adapter = LoraConfig(rank=2, alpha=4, **keys)
        freezable = build_model(model.config, model.vocabulary, projections="separate", seed=1)
        inject(freezable, adapter, TensorSource(to_canonical(model)), seed=1)
        freeze(freezable, adapter)

    return build


def planned_teacher(*bundles: str, vocabulary_map: str | None = None, data: str = "data") -> Call:
    def plan() -> None:
        pair = load_tokenizers(Path(data, "tokenizer"))
        options = TeacherOptions(
            tuple(map(Path, bundles)), vocabulary_map=None if vocabulary_map is None else Path(vocabulary_map)
        )
        plan_teachers(options, pair, VocabularySizes.of(pair.source, pair.target), open_dataset(Path(data), "train").lengths)

    return plan


def store_for(directory: str = "logits", **keys: Any) -> Call:
    objective = DistillationConfig.model_validate(keys)
    return lambda: open_logits(Path(directory), Path("data"), load_manifest(Path("data")), objective)


def dumped(*words: str) -> Call:
    """Dump again, then open it."""
    command = ("dump-logits", "--teacher", "teacher", "--data", "data", "--device", "cpu", "--output", "again", "--overwrite")
    return lambda: run(*command, *words)


def run(*words: str) -> None:
    """A verb; --debug lets its error through."""
    assert main(["--debug", *words]) == 0


def features(keys: dict[str, Any], student: dict[str, Any], *teachers: dict[str, Any]) -> Call:
    return lambda: plan_features(objective_of(keys), config_of(student), [config_of(teacher) for teacher in teachers])


def plan_with(max_tokens: int, longest: int) -> Call:
    lengths = np.array([longest, 3], np.int32)
    config = BatchingConfig(tokens_per_step=100, max_tokens=max_tokens)
    return lambda: next(StepPlan(StoredLengths(lengths, lengths), config, seed=1).epoch(1))


def dump_of(method: Any, size: int, tokens_per_shard: int | None = None) -> Call:
    sizes = VocabularySizes(source=9, target=size)
    return lambda: plan_dump(
        method, open_dataset(Path("data"), "train"), load_manifest(Path("data")), "train", "t", vocabulary=sizes,
        tokens_per_shard=tokens_per_shard,
    )  # fmt: skip


def split_of(longest: int, limit: int) -> Call:
    lengths = np.array([longest], np.int32)
    return lambda: check_split("valid", StoredLengths(lengths, lengths), MODEL.model_copy(update={"max_source_length": limit}))


def command(words: str, base: str = FAIRSEQ) -> Call:
    return lambda: recipe_from_command(f"{base} {words}")


def imported(*words: str) -> Call:
    return lambda: run("import", "fairseq-data", *words, "--output", "imported", "--overwrite")


def write_shrunk() -> Path:
    Path("short").write_text("a\n")
    return Path("short")


def read_beyond() -> None:
    with BlockReader([write_shrunk()], start=1) as reader:
        reader.read(5)


def prepared_again() -> None:
    """A preparation whose text has changed since."""
    for lines in (40, 30):
        folder = Path("corpus")
        folder.mkdir(exist_ok=True)
        prepare(data_config(folder, lines), Path("shrunk"), workers=1, overwrite=lines == 30)


def tagged(*tags: str) -> Call:
    """Tags of the two sentences of a data set."""

    class Data:
        def __len__(self) -> int:
            return 1

        def source_column(self, position: int) -> list[Any]:
            return [np.array([4])]

        def __getitem__(self, row: int) -> Any:
            return SimpleNamespace(source=np.array([4, 2]))

    tokenizer = DictionaryTokenizer(b"xx 1\nyy 1\nzz 1\n")
    return lambda: locate_tags(tags, tokenizer, Data())  # type: ignore[arg-type]


def resumed(**changes: Any) -> Call:
    """open_run of a run that has a checkpoint."""
    options = {"data": "d1", **changes}

    def resume() -> None:
        tree = {"optimizer": {"learning_rate": options.pop("rate", 1)}, "training": {"seed": options.pop("seed", 1)}}
        output = Path(options.pop("output", "resumed"))
        open_run(output, tree, ONE_PROCESS, **options).close()
        (output / "checkpoints/step_00000001").mkdir(parents=True, exist_ok=True)

    return resume


def tensor_of(size: int) -> Call:
    return lambda: build_mesh("cpu", tensor=size)


def sizes_of(config: Any, source: int, target: int) -> Call:
    return lambda: build_model(config, VocabularySizes(source=source, target=target), seed=None)


def base_of(**changes: Any) -> Call:
    return lambda: find_base(Path("teacher"), MODEL.model_copy(update=changes), load_manifest(Path("data")))


def dictionaries_in(directory: str) -> Call:
    task = {"_name": "translation", "source_lang": "en", "target_lang": "de"}
    return lambda: read_dictionaries(Path(directory), FairseqCheckpoint({}, task, {}))


def written(path: str, text: str) -> None:
    Path(path).write_text(text)


def short_teacher() -> None:
    tree = Path("teacher/model.yaml").read_text().replace("max_source_length: 1024", "max_source_length: 4")
    shutil.copytree("teacher", "short", dirs_exist_ok=True)
    Path("short/model.yaml").write_text(tree)


def short_data() -> None:
    """Pairs that the short teacher reads."""
    run("prepare", "recipe.yaml", "--output", "short_data", "--workers", "1", "--set", "data.filter.max_source_length=4",
        "--set", "data.tokenizer={kind: tokenizer_directory, path: data/tokenizer}")  # fmt: skip


def fairseq_directory(name: str = "bin", *, splits: tuple[str, ...] = ("train", "valid")) -> Path:
    folder = Path(name)
    for split in splits:
        write_pairs(folder, split, ROWS, ROWS)
    for side in ("en", "de"):
        write_dictionary(folder / f"dict.{side}.txt", ["a", "b", "c"])
    return folder


def two_pairs() -> None:
    fairseq_directory()
    write_pairs(Path("bin"), "train", ROWS, ROWS, pair="en-fr")
    write_dictionary(Path("bin/dict.fr.txt"), ["a", "b", "c"])


def text_alone(*splits: str) -> Call:
    def write() -> None:
        for split in splits:
            write_mmap(Path("lm", split), ROWS)
        write_dictionary(Path("lm/dict.txt"), ["a", "b", "c"])

    return write


def raw_text() -> None:
    folder = fairseq_directory("raw")
    for path in folder.glob("train.*"):
        path.unlink()
    for side in ("en", "de"):
        (folder / f"train.en-de.{side}").write_text("the dog runs\n" * 40)


def then(*calls: Call) -> Call:
    return lambda: [call() for call in calls]


def named(*overrides: str) -> Call:
    """Prepare the workspace's recipe with other corpora."""
    words = [word for override in overrides for word in ("--set", override)]
    return lambda: run("prepare", "recipe.yaml", "--output", "named", "--overwrite", "--workers", "1", *words)


SIZES = VocabularySizes(source=4, target=4)
ALL = PlainEmbedding(tie="all")


def no_bias(bias: str) -> Call:
    """Adapters over a module without any bias."""

    def build() -> None:
        freeze(torch.nn.Linear(2, 2, bias=False), LoraConfig(rank=2, alpha=4, targets=("*",), bias=bias))

    return build


def tables() -> None:
    table = pa.table({"a": ["x y"] * 40, "b": ["z w"] * 40})
    pq.write_table(table, "table.parquet")
    Path("hf").mkdir(exist_ok=True)
    pq.write_table(table, "hf/train.parquet")


def arrow() -> None:
    """One table in a folder that Hugging Face's datasets read."""
    Path("arrows").mkdir(exist_ok=True)
    table = pa.table({"a": ["x y"] * 40, "b": ["z w"] * 40})
    with pa.OSFile("arrows/train.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def precision(name: str) -> Call:
    """On a device without fp16."""
    able = SimpleNamespace(is_bf16_supported=lambda: True, is_fp16_supported=lambda: False)
    deepspeed = SimpleNamespace(accelerator=SimpleNamespace(get_accelerator=lambda: able))
    return lambda: require_precision(deepspeed, name, build_mesh("cpu"))  # type: ignore[arg-type]


def compiling(compiled: dict[str, str], compiler: str) -> Call:
    """With the variable that names it."""

    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", compiler)
            require_compiler(compiled, "cpu")

    return check


def meshed(device: Any) -> Call:
    """On a machine without a GPU."""

    def build() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            build_mesh(device)

    return build


def loud() -> None:
    """A teacher whose logits are beyond fp16."""
    stored = load_bundle(Path("teacher"))
    weights = {name: tensor * (1e6 if name == "projection.weight" else 1) for name, tensor in to_canonical(stored.model).items()}
    save_bundle(
        Path("loud"), model_config=stored.model_config, vocabulary=stored.vocabulary, weights=weights,
        tokenizers=stored.tokenizers, recipe=None,
    )  # fmt: skip


def spans(sentinels: int, length: int, mean: float = 3) -> Call:
    """The longest text of span corruption by a dictionary of so many sentinels."""
    tokenizer = dictionary(["a", "<mask>", *(f"<{number}>" for number in range(sentinels))])
    config = SpanCorruption(sentinels="<{}>", mean_span_length=mean)
    return lambda: build_task(config, tokenizer, "data.train.0.task").longest(length)


CASES = {
    "an adapter of no bias": case("trains nothing: the model has no such bias; set none", no_bias("all"), no_bias("none")),
    "dropout of tables": case(
        "and no target is one; set 0", lora(targets=("tokens",), dropout=0.1), lora(targets=("tokens",), dropout=0.0)
    ),
    "another base": case(
        "give the recipe the base's values (--set KEY=VALUE), or name another base", base_of(activation="gelu"), base_of()
    ),
    "a map that cannot be read": case(
        "cannot be read: {}; give a YAML or JSON file",
        lambda: read_vocabulary_map(Path("nowhere.json"), SIZES, SIZES),
        lambda: (written("map.json", '{"source": [0, 1, 2, 3]}'), read_vocabulary_map(Path("map.json"), SIZES, SIZES)),
    ),
    "a map that is not needed": case(
        "--vocabulary-map is not needed: every teacher has the vocabulary of the data; leave it out",
        then(lambda: written("map.json", "{}"), planned_teacher("teacher", vocabulary_map="map.json")),
        planned_teacher("teacher"),
    ),
    "a teacher of short sentences": case(
        "leave such pairs out and prepare again (data.filter), or choose another teacher",
        then(short_teacher, planned_teacher("short")),
        then(short_data, planned_teacher("short", data="short_data")),
        planned_teacher("teacher"),
    ),
    "an adapter without a base": case(
        "name its bundle with --base BUNDLE", checked(ADAPTER), checked(ADAPTER, base=Path("teacher"))
    ),
    "a map that is no file": case(
        "is no file; name a YAML or JSON file",
        checked(DISTILLATION, bundles=(Path("teacher"),), vocabulary_map=Path("nowhere")),
        then(
            lambda: written("map.json", "{}"), checked(DISTILLATION, bundles=(Path("teacher"),), vocabulary_map=Path("map.json"))
        ),
    ),
    "a place without a teacher": case(
        "say how a teacher works: add --teacher BUNDLE, or leave them out",
        checked(DISTILLATION, placement="sharded"),
        checked(DISTILLATION, placement="sharded", bundles=(Path("teacher"),)),
        checked(),
    ),
    "a teacher without use": case(
        "has no use for a teacher: leave {} out, or choose objective: {kind: distillation}",
        checked(bundles=(Path("teacher"),)),
        checked(),
        checked(DISTILLATION, bundles=(Path("teacher"),)),
    ),
    "two sources": case(
        "are two sources of the same signal: leave one of them out",
        checked(DISTILLATION, bundles=(Path("teacher"),), logits=Path("logits")),
        checked(DISTILLATION, bundles=(Path("teacher"),)),
        checked(DISTILLATION, logits=Path("logits")),
    ),
    "no source": case(
        "or --logits LOGITS for what `dstrain dump-logits` wrote, or choose objective: {kind: cross_entropy}",
        checked(DISTILLATION),
        checked(DISTILLATION, bundles=(Path("teacher"),)),
        checked(DISTILLATION, logits=Path("logits")),
        checked("objective={kind: cross_entropy}"),
    ),
    "a precision of stored logits": case(
        "dumped logits are as they are: leave it out beside --logits",
        checked("objective={kind: distillation, teacher_precision: bf16}", logits=Path("logits")),
        checked(DISTILLATION, logits=Path("logits")),
    ),
    "renormalized without logits": case(
        "gives its whole distribution: leave it out beside --teacher",
        checked("objective={kind: distillation, renormalize: true}", bundles=(Path("teacher"),)),
        checked(DISTILLATION, bundles=(Path("teacher"),)),
    ),
    "a file as a run": case("--output {} is a file; name a directory", checked(output="text"), checked()),
    "data as a run": case("name a new directory, or that of an earlier run", checked(output="labeled"), checked()),
    "a change of no resume": case(
        "leave it out to begin with this recipe, or name the --output of the run",
        checked(accept=("optimizer.learning_rate",)),
        checked(),
    ),
    "a change that is never accepted": case(
        "for another one start a new run, with --base RUN/bundles/last if the model is",
        checked("training.seed=5", accept=("training.seed",)),
        checked("training.seed=5", base=Path("run/bundles/step_00000010")),
    ),
    "a pair over max_tokens": case(
        "raise that, or lower data.filter.max_{}_length and prepare again",
        plan_with(10, 20),
        plan_with(20, 20),
        plan_with(10, 10),
    ),
    "data of another recipe": case(
        "undo these changes, or prepare the data again into another directory",
        checked("data.filter.max_ratio=8"),
        checked(),
        then(named("data.filter.max_ratio=8"), checked("data.filter.max_ratio=8", data="named")),
    ),
    "a shard that is none": case(
        "cannot be read as a shard ({}); prepare the data again",
        lambda: (written("data/train/00000.arrow", "no shard"), read_shard(Path("data/train/00000.arrow"))),
        lambda: (run(*PREPARE), read_shard(Path("data/train/00000.arrow"))),
    ),
    "a pair that validation cannot read": case(
        "raise that limit, or leave such pairs out and prepare again", split_of(20, 10), split_of(20, 20), split_of(10, 10)
    ),
    "a text that became shorter": case(
        "has become shorter since preparation began (read with {}); run again with --overwrite", read_beyond, prepared_again
    ),
    "more spans than sentinels": case(
        "name them up to {} in data.tokenizer.user_symbols, raise mean_span_length, or lower data.filter.max_target_length, and",
        spans(2, 100),
        spans(5, 100),
        spans(2, 100, mean=9),
        spans(2, 40),
    ),
    "a task without its symbol": case(
        "name it in data.tokenizer.user_symbols (for a dictionary, append the line '{} 0' to its file) and prepare again",
        spans(0, 9),
        spans(1, 9),
    ),
    "a tag that is no symbol": case(
        "name it in data.tokenizer.user_symbols and prepare again, or correct objective.selection.tags",
        tagged("qq"),
        tagged("xx"),
    ),
    "a sentence without a tag": case(
        "add its tag to objective.selection.tags, or choose selection: {kind: global}", tagged("yy"), tagged("xx")
    ),
    "logits of another temperature": case(
        "set that, or dump them again with --temperature {}",
        store_for(temperature=2),
        store_for(temperature=1),
        then(dumped("--temperature", "2"), store_for("again", temperature=2)),
    ),
    "a divergence without its mass": case(
        "choose forward_kl, a dump with a tail (dump-logits --method topk) or of all tokens",
        store_for(divergence={"kind": "reverse_kl"}),
        store_for(divergence={"kind": "forward_kl"}),
        then(dumped("--method", "topk", "--k", "8"), store_for("again", divergence={"kind": "reverse_kl"})),
        then(dumped("--method", "dense"), store_for("again", divergence={"kind": "reverse_kl"})),
    ),
    "own samples without a teacher": case(
        "remove objective.on_policy, or name an online teacher (--teacher)",
        store_for(on_policy={"fraction": 0.5}),
        store_for(),
        checked("objective={kind: distillation, on_policy: {fraction: 0.5}}", bundles=(Path("teacher"),)),
    ),
    "features without a teacher": case(
        "leave objective.features out, or choose an online teacher (--teacher)",
        store_for(features=[feature()]),
        store_for(),
        features(feature(), STUDENT, TEACHER),
    ),
    "a directory without logits": case(
        "holds no dumped logits; name a directory that `dstrain {}` wrote: {}",
        lambda: load_store_manifest(Path("data")),
        lambda: load_store_manifest(Path("logits")),
    ),
    "a dense dump of many entries": case(
        "use --method sample, which keeps about 40 and is unbiased",
        dump_of(DenseMethod(), 65_536),
        dump_of(SampleMethod(), 65_536),
    ),
    "a shard too large for a file": case(
        "make files of {} bytes; lower --tokens-per-shard",
        dump_of(SampleMethod(), 120, 10**12),
        dump_of(SampleMethod(), 120, 10_000),
    ),
    "features of an ensemble": case(
        "name one --teacher BUNDLE (an ensemble has no layers in common), or leave objective.features",
        features(feature(), STUDENT, TEACHER, TEACHER),
        features(feature(), STUDENT, TEACHER),
    ),
    "attention of another kind": case(
        "choose kind: hidden_states, or leave it out",
        features(feature(), STUDENT, DECODER_ONLY),
        features(feature(kind="hidden_states"), STUDENT, DECODER_ONLY),
    ),
    "a side that is not there": case(
        "choose side: decoder, or leave it out",
        features(feature(kind="hidden_states", side="encoder"), DECODER_ONLY, DECODER_ONLY),
        features(feature(kind="hidden_states", side="decoder"), DECODER_ONLY, DECODER_ONLY),
    ),
    "two vocabularies that are tied": case(
        "train a joint tokenizer (data.tokenizer.sharing: joint) or choose tie: decoder",
        sizes_of(MODEL.model_copy(update={"embedding": ALL}), 9, 10),
        sizes_of(MODEL.model_copy(update={"embedding": ALL}), 10, 10),
        sizes_of(MODEL, 9, 10),
    ),
    "two vocabularies of one stack": case(
        "source and target with one vocabulary, but they have {} and {} entries; train a joint tokenizer",
        sizes_of(config_of(DECODER_ONLY), 9, 10),
        sizes_of(config_of(DECODER_ONLY), 10, 10),
    ),
    "more tensor ranks than ranks": case("start a multiple of {} ranks, or lower one of the two", tensor_of(2), tensor_of(1)),
    "no directory of fairseq": case(
        "is no directory; give the --destdir of fairseq-preprocess",
        imported("nowhere"),
        then(fairseq_directory, imported("bin")),
    ),
    "other languages": case(
        "check --source-lang and --target-lang",
        then(fairseq_directory, imported("bin", "--source-lang", "en", "--target-lang", "fr")),
        imported("bin", "--source-lang", "en", "--target-lang", "de"),
    ),
    "two pairs of languages": case(
        "names no single language pair (found: {}); give --source-lang and --target-lang",
        then(two_pairs, imported("bin")),
        imported("bin", "--source-lang", "en", "--target-lang", "de"),
    ),
    "no validation set": case(
        "has no valid.{}-{}.{}.idx; binarize a validation set with --validpref",
        then(partial(fairseq_directory, splits=("train",)), imported("bin")),
        then(fairseq_directory, imported("bin")),
    ),
    "no validation text": case(
        "has no valid.idx; binarize a validation set with --validpref",
        then(text_alone("train"), imported("lm")),
        then(text_alone("train", "valid"), imported("lm")),
    ),
    "raw text": case(
        "name the text files in the recipe: kind: parallel",
        then(raw_text, imported("raw", "--source-lang", "en", "--target-lang", "de")),
        named(
            "data.train=[{kind: parallel, source: raw/train.en-de.en, target: raw/train.en-de.de}]",
            "data.tokenizer.vocab_size=30",
            "data.filter.max_ratio=null",
        ),
    ),
    "no dictionary": case(
        "give the directory of the model's dictionaries with --dictionary",
        dictionaries_in("text_only"),
        then(fairseq_directory, dictionaries_in("bin")),
    ),
    "a command line far from its data": case(
        "so its languages are unknown; give --source-lang and --target-lang",
        command("", FAIRSEQ.replace("-s en -t de", "")),
        command(""),
    ),
    "no share that learns": case(
        "give a share above 0, at most 1",
        command(f"""{KD} --kd-args '{{"strategy": "batch_level"}}'"""),
        command(f"""{KD} --kd-args '{{"strategy": "batch_level", "rate": 0.5}}'"""),
    ),
    "a schedule without an end": case(
        "has no end here; add {} or --max-update to the command line",
        command("--lr-scheduler polynomial_decay", FAIRSEQ.replace("--max-update 1000", "")),
        command("--lr-scheduler polynomial_decay"),
        command("--lr-scheduler polynomial_decay --total-num-update 9", FAIRSEQ.replace("--max-update 1000", "")),
    ),
    "a metric that is not made": case(
        "needs --eval-bleu; add it to the command line",
        command("--best-checkpoint-metric bleu"),
        command("--best-checkpoint-metric bleu --eval-bleu"),
    ),
    "parquet as text": case(
        "name it in a recipe: {kind: parquet, path: FILE, source: COLUMN, target: COLUMN}",
        lambda: (tables(), read_lines("table.parquet")),
        named("data.train=[{kind: parquet, path: table.parquet, source: a, target: b}]", "data.tokenizer.vocab_size=12"),
    ),
    "a table that became shorter": case(
        "has become shorter since preparation began; run again with --overwrite",
        lambda: RecordReader(iter([]), 0, "table").read(5),
        prepared_again,
    ),
    "a file as a data set": case(
        "is a file, not a data set; name its folder, or read it by kind: parquet or jsonl",
        lambda: (
            tables(),
            load_data_set(HuggingFaceDataset(kind="huggingface", dataset="table.parquet", source="a", target="b")),
        ),
        named("data.train=[{kind: parquet, path: table.parquet, source: a, target: b}]", "data.tokenizer.vocab_size=12"),
        named("data.train=[{kind: huggingface, dataset: hf, source: a, target: b}]", "data.tokenizer.vocab_size=12"),
    ),
    "an Arrow file as text": case(
        "name its folder in a recipe: {kind: huggingface, dataset: DIR}, or write its text to a file",
        lambda: (arrow(), read_lines("arrows/train.arrow")),
        named("data.train=[{kind: huggingface, dataset: arrows, source: a, target: b}]", "data.tokenizer.vocab_size=12"),
        lambda: (written("text", "x y"), read_lines("text")),
    ),
    "a precision beyond the device": case(
        "engine.precision = {} is not supported by this {}; use {}", precision("fp16"), precision("fp32"), precision("bf16")
    ),
    "a compiler that is not there": case(
        "engine.{} needs a compiler, but {} is not on the PATH; install it, set the variable {} to another one, or choose "
        "engine.{}",
        compiling({"compile = layers": "compile: none"}, "no-such-compiler"),
        compiling({"compile = layers": "compile: none"}, "sh"),
        compiling({}, "no-such-compiler"),
    ),
    "a directory that cannot be made": case(
        "choose a directory that can be written", resumed(output="/proc/nowhere/run"), resumed(output="afresh")
    ),
    "a device that is not there": case("use --device cpu, or check the driver", meshed("cuda"), meshed("cpu")),
    "logits that overflow": case(
        "choose another --precision (fp32 has the widest range), or check the bundle",
        lambda: (loud(), dumped("--teacher", "loud", "--precision", "fp16")()),
        dumped("--teacher", "loud", "--precision", "fp32"),
    ),
    "another recipe of a run": case(
        "undo these changes to resume, {}or choose another --output to train afresh",
        then(resumed(), resumed(rate=2)),
        resumed(),
        resumed(rate=2, accept=["optimizer.learning_rate"]),
        resumed(rate=2, output="afresh"),
    ),
    "a damaged description of a run": case(
        "restore it, or choose another --output",
        lambda: (resumed()(), shutil.copy("resumed/run.json", "kept"), written("resumed/run.json", "{"), resumed()()),
        lambda: (shutil.copy("kept", "resumed/run.json"), resumed()()),
        resumed(output="afresh"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_can_be_followed(name: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(DstrainError, match=pattern(CASES[name].message)):
        CASES[name].fails()
    for follow in CASES[name].follows:
        follow()
