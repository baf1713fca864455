"""A dumped store gives, for any batch, what the teacher says of its tokens; damaged, unfit and unfinished ones are refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.data.batching.loader import TrainLoader
from dstrain.data.batching.plan import StepPlan, evaluation_batches
from dstrain.data.config import BatchingConfig
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.distillation.config import DistillationConfig, JensenShannon
from dstrain.distillation.objective import signal_request
from dstrain.distillation.signals import SignalRequest
from dstrain.distillation.store import dump as logit_dump
from dstrain.distillation.store.codec import build_codec
from dstrain.distillation.store.dump import plan_dump, token_keys
from dstrain.distillation.store.manifest import DenseMethod, DumpJob, Method, SampleMethod, TopKMethod, merge_store
from dstrain.distillation.store.store import describe_store, open_store, shard_starts
from dstrain.errors import DataError, RecipeError
from dstrain.models.config import DecoderOnlyConfig, DecoderOnlyStackConfig, EncoderDecoderConfig, VocabularySizes
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import build_model
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.ops.teacher_signal import KeptSignal, LogProbsSignal, SparseSignal
from dstrain.storage import document, mapped_shards
from dstrain.storage.hashing import sha256_of_file
from dstrain.storage.sharded_job import Worker
from tests.unit.distillation.toy_store import COLLATOR, batch_of, dump, dumper, prepared, stored, teacher_for, teacher_probs

METHODS = [SampleMethod(draws=20), TopKMethod(k=5), TopKMethod(k=5, dtype="float32", temperature=2.0), DenseMethod()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="module")
def teacher(data: Path) -> EncoderDecoder:
    return teacher_for(data)


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def parts_of(signal: KeptSignal) -> list[Tensor]:
    """(n, ...) each."""
    if isinstance(signal, SparseSignal):
        return [signal.probs, signal.ids, signal.tail[:, None]]
    return [torch.from_numpy(np.concatenate(signal.log_probs))]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_entries_in_order_are_the_teachers_distribution(
    temperature: float, data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    types = teacher.vocabulary.target
    store = stored(data, tmp_path / "logits", TopKMethod(k=types, dtype="float32", temperature=temperature), teacher=teacher)
    dataset = open_dataset(data, "train")
    rows = [59, 3, 17, 0, 44]
    signal = store.signal(batch_of(dataset, rows))
    found = torch.zeros(len(signal.ids), types).scatter_(1, signal.ids, signal.probs)
    torch.testing.assert_close(found, teacher_probs(teacher, dataset, rows, temperature), rtol=1e-5, atol=1e-8)
    assert not signal.tail.any()
    assert store.temperature == temperature


def test_a_decoder_only_teacher_is_dumped_like_any_other(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    config = DecoderOnlyConfig(model_dim=16, decoder=DecoderOnlyStackConfig(depth=1, num_heads=2, ffn_dim=16))
    model = build_model(config, teacher.vocabulary, seed=3).eval()
    store = stored(data, tmp_path / "logits", TopKMethod(k=teacher.vocabulary.target, dtype="float32"), teacher=model)
    dataset, rows = open_dataset(data, "train"), [59, 3, 17]
    signal = store.signal(batch_of(dataset, rows))
    found = torch.zeros(len(signal.ids), teacher.vocabulary.target).scatter_(1, signal.ids, signal.probs)
    torch.testing.assert_close(found, teacher_probs(model, dataset, rows), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.temperature}")
def test_a_tokens_signal_is_independent_of_its_batch(method: Method, data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    store = stored(data, tmp_path / "logits", method, teacher=teacher, tokens_per_shard=90)
    assert store.manifest.job.shards > 3
    dataset = open_dataset(data, "train")
    alone = {row: parts_of(store.signal(batch_of(dataset, [row]))) for row in range(len(dataset))}
    plan = StepPlan(dataset.lengths, BatchingConfig(tokens_per_step=200, max_tokens=120), seed=1)
    seen = 0
    for rank in range(2):
        with TrainLoader(dataset, plan, COLLATOR, data_rank=rank, data_size=2) as loader:
            for step, batches in loader:
                for batch in batches:
                    together, start = parts_of(store.signal(batch)), 0
                    for row in batch.examples.ids.tolist():
                        one = alone[row]
                        part, width = slice(start, start + len(one[0])), one[0].shape[1]
                        for whole, own in zip(together, one, strict=True):
                            assert torch.equal(whole[part, :width], own)
                        assert not together[0][part, width:].any()
                        start += len(one[0])
                        seen += 1
                if step.last_of_epoch:
                    break
    assert seen == len(dataset)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.temperature}")
def test_the_bytes_are_the_same_however_the_work_is_shared(
    method: Method, data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    dump(dumper(data, tmp_path / "whole", method, teacher=teacher, tokens_per_shard=100))
    for index in (2, 0, 1):
        dump(dumper(data, tmp_path / "shares", method, teacher=teacher, tokens_per_shard=100), Worker(index, 3))
    assert tree(tmp_path / "whole") == tree(tmp_path / "shares")
    assert merge_store(tmp_path / "whole", "x") == merge_store(tmp_path / "shares", "x")


def test_another_size_of_batches_or_shards_moves_no_draw_but_at_the_edge_of_rounding(
    data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    signals = []
    for number, (max_tokens, per_shard) in enumerate([(30, 60), (200, None), (1000, 300)]):
        output = tmp_path / str(number)
        work = dumper(data, output, SampleMethod(), teacher=teacher, tokens_per_shard=per_shard, max_tokens=max_tokens)
        dump(work)
        merge_store(output, "a test")
        dataset = open_dataset(data, "train")
        store = open_store(output, data=data, manifest=load_manifest(data))
        signal = store.signal(batch_of(dataset, range(len(dataset))))
        types = teacher.vocabulary.target
        signals.append(torch.zeros(len(signal.ids), types).scatter_add_(1, signal.ids.clamp_min(0), signal.probs))
    for other in signals[1:]:
        assert (other - signals[0]).abs().sum() / 2 / len(other) < 1e-3  # share of draws that moved


def test_an_interrupted_dump_goes_on_and_mends_what_is_damaged(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for output in (whole, torn):
        dump(dumper(data, output, SampleMethod(), teacher=teacher, tokens_per_shard=100))
    files = sorted(torn.glob("*.arrow"))
    assert len(files) >= 5
    files[0].unlink()
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(bytes(content))
    files[2].with_suffix(".json").unlink()
    files[3].with_suffix(".json").write_text("{")
    with pytest.raises(
        DataError, match=r"4 of \d+ shards are missing or damaged \(0, 1, 2, 3\); run `dstrain dump-logits` again"
    ):
        merge_store(torn, "a test")
    report = dump(dumper(data, torn, SampleMethod(), teacher=teacher, tokens_per_shard=100))
    assert (report.shards, report.finished_before) == (4, len(files) - 4)
    assert tree(torn) == tree(whole)
    again = dump(dumper(data, torn, SampleMethod(), teacher=teacher, tokens_per_shard=100))
    assert again.shards == 0
    assert "nothing to do" in again.line()


def test_a_person_sees_checksums_being_compared(
    data: Path, teacher: EncoderDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = dumper(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=300)
    dump(work)
    checks: list[Callable[[], object]] = [
        lambda: merge_store(tmp_path / "logits", "a test"),
        lambda: describe_store(tmp_path / "logits"),
    ]
    for check in checks:
        check()
        assert capsys.readouterr().err == ""  # into a file
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for check in checks:
        check()
        assert re.search(rf"checking .*0/{work.job.shards} (files|shards)", capsys.readouterr().err)


def test_an_error_of_the_teacher_leaves_only_finished_shards(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    work = dumper(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=100)
    calls = 0

    def failing(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.run(Worker(0, 1), failing)
    names = {path.name for path in (tmp_path / "logits").iterdir()}
    assert not any(name.endswith(".tmp") for name in names)
    done = sum(name.endswith(".arrow") for name in names)
    assert 0 < done < work.job.shards
    assert dump(work).finished_before == done


@pytest.mark.parametrize("method", [SampleMethod(), TopKMethod(k=5), DenseMethod()], ids=lambda method: method.kind)
def test_logits_that_are_not_finite_are_refused(method: Method, data: Path, tmp_path: Path) -> None:
    """A shard a row, so that the batch which is wrong is also the last of its shard."""
    dataset, broken = open_dataset(data, "train"), teacher_for(data)
    last = len(dataset) - 1
    earlier = {int(id_) for row in range(last) for id_ in dataset[row].source}
    word = next((int(id_) for id_ in dataset[last].source if int(id_) not in earlier), int(dataset[last].source[0]))
    first = next(row for row in range(len(dataset)) if word in dataset[row].source)
    with torch.no_grad():
        broken.source_embedding.tokens.weight[word] = torch.nan
    with pytest.raises(DataError, match=rf"teacher some teacher are not finite for row {first} of the split 'train': .*--preci"):
        dump(dumper(data, tmp_path / "logits", method, teacher=broken, tokens_per_shard=1))
    assert not (tmp_path / "logits" / f"{first:05d}.arrow").exists()
    assert (tmp_path / "logits" / f"{first - 1:05d}.arrow").exists() == (first > 0)


def test_the_report_adds_up_what_the_device_worked(
    data: Path, teacher: EncoderDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that jumps 7 seconds a reading, of which a batch has two."""
    looks: list[float] = []
    monkeypatch.setattr(logit_dump, "timestamp", lambda device: looks.append(7.0 * len(looks)) or looks[-1])
    report = dump(dumper(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=100))
    assert report.shards > 3
    assert report.teacher_seconds == 7.0 * len(looks) / 2


def test_shards_end_with_the_row_that_fills_them() -> None:
    lengths = np.array([3, 4, 5, 1, 9, 2, 2], np.int32)
    assert shard_starts(lengths, 7) == [0, 2, 5, 7]
    assert shard_starts(lengths, 8) == [0, 3, 5, 7]
    assert shard_starts(lengths, 1) == list(range(8))
    assert shard_starts(lengths, 1000) == [0, 7]


def test_shards_are_found_without_an_object_a_row() -> None:
    lengths = np.full(200_000, 1000, np.int32)
    tracemalloc.start()
    starts = shard_starts(lengths, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert starts == list(range(0, 200_001, 1000))
    assert peak < 20 * len(lengths)


def test_an_empty_micro_batch_has_no_signal(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    store = stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher)
    empty = COLLATOR([], np.array([], np.int64))
    assert len(store.signal(empty).ids) == 0
    with store.open(empty) as signal:
        assert isinstance(signal, SparseSignal)
        assert signal.tail.shape == (0,)


def test_an_empty_micro_batch_has_no_log_probabilities(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    store = stored(data, tmp_path / "logits", DenseMethod(), teacher=teacher)
    signal = store.signal(COLLATOR([], np.array([], np.int64)))
    assert isinstance(signal, LogProbsSignal)
    assert sum(map(len, signal.log_probs)) == 0


def test_all_entries_can_teach_anything_of_the_data(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    store = stored(data, tmp_path / "logits", DenseMethod(temperature=2.0), teacher=teacher)
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_kl"):
        for temperature in (1.0, 2.0):
            store.require(SignalRequest(divergence, temperature))
    with pytest.raises(RecipeError, match=r"objective.on_policy needs a teacher of the student's samples"):
        store.require(SignalRequest("forward_kl", 2.0, on_policy=True))
    with pytest.raises(RecipeError, match=r"objective.features learns from inside a teacher"):
        store.require(SignalRequest("forward_kl", 2.0, features=True))


def test_draws_teach_the_forward_divergence_only_at_the_dumps_temperature(
    data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    store = stored(data, tmp_path / "logits", SampleMethod(temperature=2.0), teacher=teacher)
    fitting = SignalRequest("forward_kl", 2.0)
    store.require(fitting)
    store.require(signal_request(DistillationConfig(divergence=JensenShannon(beta=0), temperature=2.0)))
    with pytest.raises(RecipeError, match=r"kind = reverse_kl needs the mass of all tokens, .* keeps draws: choose forward_kl"):
        store.require(fitting._replace(divergence="reverse_kl"))
    with pytest.raises(RecipeError, match=r"objective.temperature = 1, but the logits in .* are of temperature 2: set that, or"):
        store.require(fitting._replace(temperature=1.0))
    with pytest.raises(RecipeError, match=r"objective.on_policy needs a teacher of the student's samples, .* remove objec"):
        store.require(fitting._replace(on_policy=True))
    with pytest.raises(
        RecipeError, match=r"objective.features learns from inside a teacher, but .*logits keeps only its probabilities"
    ):
        store.require(fitting._replace(features=True))


def test_likely_tokens_with_a_tail_teach_every_divergence_at_the_dumps_temperature(
    data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    store = stored(data, tmp_path / "logits", TopKMethod(k=4, temperature=2.0), teacher=teacher)
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_kl"):
        store.require(SignalRequest(divergence, 2.0))
        with pytest.raises(RecipeError, match=r"objective.temperature = 1, but the logits"):
            store.require(SignalRequest(divergence, 1.0))


def test_renormalizing_is_biased_and_says_so(
    data: Path, teacher: EncoderDecoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    logging.getLogger("dstrain").propagate = True
    kept = stored(data, tmp_path / "logits", TopKMethod(k=5), teacher=teacher)
    batch = batch_of(open_dataset(data, "train"), [1, 2])
    assert (kept.signal(batch).tail > 0.1).all()
    manifest = load_manifest(data)
    scaled = open_store(tmp_path / "logits", data=data, manifest=manifest, renormalize=True)
    assert "the gradient is biased" in caplog.text
    torch.testing.assert_close(scaled.signal(batch).probs.sum(1), torch.ones(batch.num_targets))
    assert not scaled.signal(batch).tail.any()
    stored(data, tmp_path / "sampled", SampleMethod(), teacher=teacher)
    with pytest.raises(DataError, match="method sample, which leaves no tail; only topk can be renormalized"):
        open_store(tmp_path / "sampled", data=data, manifest=manifest, renormalize=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("00001.arrow", flip, "00001.arrow: the SHA-256 differs .* dump this shard again with the same command"),
        ("00001.arrow", truncate, "00001.arrow holds .* bytes, the manifest says .* dump this shard again"),
        ("00001.arrow", Path.unlink, "00001.arrow: No such file .* dump this shard again"),
        (
            "logits.json",
            Path.unlink,
            "logits.json is missing: the dump was not finished; run it again",
        ),
        ("logits.json", truncate, "logits.json is not valid JSON .* run `dstrain dump-logits --merge` again"),
    ],
)
def test_damage_is_named(file: str, damage: Callable[[Path], None], message: str, data: Path, tmp_path: Path) -> None:
    stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher_for(data), tokens_per_shard=100)
    damage(tmp_path / "logits" / file)
    with pytest.raises(DataError, match=message):
        open_store(tmp_path / "logits", data=data, manifest=load_manifest(data))


def test_a_large_store_is_checked_shard_by_shard_when_it_is_touched(
    data: Path, teacher: EncoderDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=100)
    rows = [shard.first_row for shard in store.manifest.shards]
    dataset = open_dataset(data, "train")
    expected = parts_of(store.signal(batch_of(dataset, [rows[0]])))
    hashed: list[str] = []
    monkeypatch.setattr(document, "sha256_of_file", lambda path: (hashed.append(path.name), sha256_of_file(path))[1])
    monkeypatch.setattr(mapped_shards, "ALWAYS_HASHED_SHARDS", 1)
    flip(tmp_path / "logits" / "00001.arrow")
    store = open_store(tmp_path / "logits", data=data, manifest=load_manifest(data))
    assert hashed == []
    torch.testing.assert_close(parts_of(store.signal(batch_of(dataset, [rows[0]]))), expected, rtol=0, atol=0)
    store.signal(batch_of(dataset, [rows[2], rows[0]]))
    assert hashed == ["00000.arrow", "00002.arrow"]
    with pytest.raises(DataError, match=r"00001.arrow: the SHA-256 differs .* dump this shard again with the same command"):
        store.signal(batch_of(dataset, [rows[1]]))


def test_a_changed_manifest_is_refused(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=100)
    path = tmp_path / "logits" / "logits.json"
    whole = json.loads(path.read_text())
    for change, message in [
        (lambda c: c["shards"].pop(1), "shard 2 begins at row"),
        (lambda c: c["shards"].pop(), "the job has"),
        (lambda c: c["job"].update(format_version=2), "format_version 2, this dstrain reads 1"),
        (lambda c: c["job"]["method"].update(draws=0), "draws"),
        (lambda c: c.update(extra=1), "extra"),
    ]:
        content = json.loads(json.dumps(whole))
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            open_store(tmp_path / "logits", data=data, manifest=load_manifest(data))


def test_logits_of_other_data_another_tokenizer_or_teacher_are_refused(
    data: Path, teacher: EncoderDecoder, tmp_path: Path
) -> None:
    store = stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher)
    other = prepared(tmp_path / "other", vocab_size=110)
    with pytest.raises(DataError, match=r"are of tokenizer .* ids would mean other words; dump the logits of this data"):
        open_store(tmp_path / "logits", data=other, manifest=load_manifest(other))
    manifest = load_manifest(data)
    valid = manifest.model_copy(update={"splits": {**manifest.splits, "train": manifest.splits["valid"]}})
    with pytest.raises(DataError, match=r"are of other data .* than the split 'train' of .* rows would be other sentences"):
        open_store(tmp_path / "logits", data=data, manifest=valid)
    with pytest.raises(DataError, match=r"are of another teacher \(some teacher\) than bundle \(a newer one\); dump them again"):
        store.manifest.job.require_teacher("a newer one", tmp_path / "logits", Path("bundle"))
    with pytest.raises(
        DataError, match=r"was started with another job .*method: .*draws.*; give its options, choose another --output"
    ):
        dump(dumper(data, tmp_path / "logits", SampleMethod(draws=51), teacher=teacher))
    with pytest.raises(DataError, match=r"holds 7 rows|holds .* tokens for the rows|a batch asks for row"):
        valid_rows = open_dataset(data, "valid")
        store.signal(batch_of(valid_rows, range(7)))


def test_a_directory_of_something_else_is_not_touched(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(DataError, match=r"holds files that `dstrain dump-logits` did not make \(chapter.tex\)"):
        dump(dumper(data, tmp_path / "thesis", SampleMethod(), teacher=teacher))
    with pytest.raises(DataError, match="was not written by `dstrain dump-logits`"):
        merge_store(tmp_path / "nothing", "a test")
    with pytest.raises(DataError, match="holds no dumped logits; name a directory that `dstrain dump-logits` wrote"):
        open_store(data, data=data, manifest=load_manifest(data))


@pytest.mark.parametrize(
    ("method", "vocab_size", "message"),
    [
        (TopKMethod(k=121), 120, "k = 121 exceeds the 120 entries of the vocabulary; lower --k"),
        (DenseMethod(), 65_536, "would keep 131,072 bytes a token .* use --method sample"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused(method: Method, vocab_size: int, message: str, data: Path) -> None:
    dataset, manifest = open_dataset(data, "train"), load_manifest(data)
    with pytest.raises(DataError, match=message):
        plan_dump(
            method,
            dataset,
            manifest,
            "train",
            "t",
            vocabulary=VocabularySizes(source=9, target=vocab_size),
            tokens_per_shard=None,
        )


class ManyRows:
    """400,000 rows of 500 tokens."""

    target_lengths = np.full(400_000, 500, np.int32)

    def __len__(self) -> int:
        return len(self.target_lengths)


def plan_of_many_rows(method: Method, vocab_size: int, data: Path, tokens_per_shard: int | None = None) -> DumpJob:
    sizes, rows = VocabularySizes(source=9, target=vocab_size), cast(Dataset, ManyRows())
    return plan_dump(method, rows, load_manifest(data), "train", "t", vocabulary=sizes, tokens_per_shard=tokens_per_shard)


@pytest.mark.parametrize(("draws", "vocab_size", "distinct"), [(50, 32_000, 50), (5000, 32_000, 5000), (65_535, 400, 400)])
def test_a_shard_has_space_for_draws_that_are_all_distinct(draws: int, vocab_size: int, distinct: int, data: Path) -> None:
    job = plan_of_many_rows(SampleMethod(draws=draws), vocab_size, data)
    assert job.tokens_per_shard >= 4096
    assert (job.tokens_per_shard + 500) * distinct < 2**31
    with pytest.raises(DataError, match=r"20,000,000 tokens a shard make files of .* bytes; lower --tokens-per-shard"):
        plan_of_many_rows(SampleMethod(draws=draws), vocab_size, data, tokens_per_shard=20_000_000)


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"draws": 70_000}])
def test_draws_and_temperature_are_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SampleMethod.model_validate(wrong)


def test_a_description_names_its_contents(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher, tokens_per_shard=100)
    text = "\n".join(describe_store(tmp_path / "logits"))
    assert "50 draws" in text
    assert "60 rows" in text
    assert "every checksum is right" in text
    flip(tmp_path / "logits" / "00000.arrow")
    with pytest.raises(DataError, match=r"00000.arrow"):
        describe_store(tmp_path / "logits")


@pytest.mark.parametrize(
    ("method", "distinct", "limit"), [(SampleMethod(), 12, 40.0), (TopKMethod(k=64), 64, 200.0)], ids=["sample", "topk"]
)
def test_bytes_per_token_at_a_vocabulary_of_65536(method: Method, distinct: int, limit: float, tmp_path: Path) -> None:
    """Sentences of 25 tokens in the median; one in twelve of 3, whose teacher has `distinct` likely tokens; file and contents."""
    from dstrain.distillation.store.dump import ShardDraft
    from dstrain.storage.atomic import atomic_writer

    generator, draw = torch.Generator().manual_seed(1), np.random.default_rng(1)
    lengths = np.exp(draw.normal(np.log(25), 0.6, 120)).clip(3, 100).astype(int)
    lengths[::12] = 3
    assert 23 <= np.median(lengths) <= 27
    draft = ShardDraft(build_codec(method, 65_536))
    for examples in np.arange(len(lengths)).reshape(-1, 10):
        pairs = [(np.arange(lengths[row]), np.arange(lengths[row])) for row in examples]
        batch = COLLATOR(pairs, examples)
        logits = torch.full((batch.num_targets, 65_536), -30.0)
        logits.scatter_(1, torch.randint(65_536, (len(logits), distinct), generator=generator), 0.0)
        draft.add(batch, [tensor.numpy() for tensor in draft.codec.select(logits, token_keys(batch))])
    with atomic_writer(tmp_path / "shard") as sink:
        tokens = draft.finish(sink)
    print(f"{sink.size / tokens:.1f} bytes a token")
    assert tokens == lengths.sum()
    assert sink.size / tokens <= limit


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.temperature}")
def test_a_store_is_mapped_and_never_copied(method: Method, data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    store = stored(data, tmp_path / "logits", method, teacher=teacher, tokens_per_shard=300)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for note, shard in zip(store.manifest.shards, store._shards, strict=True):
        file = str(tmp_path / "logits" / note.record.file)
        taps = [range(*(int(end, 16) for end in line[0].split("-"))) for line in mapped if line[-1] == file]
        for column in shard.values():
            for array in (column.offsets, column.values, column.row(1)):
                assert not array.flags.owndata
                assert not array.flags.writeable
                assert any(array.ctypes.data in tap for tap in taps)


def test_reading_costs_little_beside_a_step(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    """3,400 tokens, the size of a step on one CPU, which takes half a second and more."""
    store = stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher)
    batch = batch_of(open_dataset(data, "train"), list(range(60)) * 7)
    assert batch.num_targets > 3000
    store.signal(batch)
    start = time.process_time()
    for _ in range(10):
        store.signal(batch)
    assert (time.process_time() - start) / 10 < 0.025


@pytest.mark.slow
def test_the_teacher_takes_nine_tenths_of_a_dump(tmp_path: Path) -> None:
    """CPU time of a dump and of the bare forward pass with its softmax, on the same batches; a small teacher, 8,000 entries."""
    data = prepared(tmp_path / "data", num_pairs=400, vocab_size=600)
    stack = {"depth": 6, "num_heads": 4, "ffn_dim": 1024}
    config = EncoderDecoderConfig.model_validate({"model_dim": 256, "encoder": stack, "decoder": stack})
    sizes = VocabularySizes(source=8000, target=8000)
    teacher = build_model(config, sizes, seed=1).eval()
    work = replace(dumper(data, tmp_path, SampleMethod(), teacher=teacher, max_tokens=4096), chunk_tokens=256)

    def only_forward() -> None:
        with torch.inference_mode():
            for group in evaluation_batches(work.dataset.source_lengths, work.dataset.target_lengths, 4096):
                batch = batch_of(work.dataset, group.tolist())
                hidden = target_hidden(teacher, batch)
                for chunk in hidden.split(256):
                    torch.softmax(teacher.project(chunk), 1)

    def seconds(action: Callable[[], object]) -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    only_forward()
    alone, whole = [], []
    for turn in range(4):  # in turns, and the best of each: the machine may be busy
        alone.append(seconds(only_forward))
        whole.append(seconds(lambda turn=turn: dump(replace(work, output=tmp_path / f"logits{turn}"))))
    assert min(alone) / min(whole) >= 0.9, (alone, whole)


def test_a_copied_store_is_the_same_store(data: Path, teacher: EncoderDecoder, tmp_path: Path) -> None:
    stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher)
    shutil.copytree(tmp_path / "logits", tmp_path / "copy")
    batch = batch_of(open_dataset(data, "train"), [5])
    manifest = load_manifest(data)
    one, two = (open_store(tmp_path / name, data=data, manifest=manifest).signal(batch) for name in ("logits", "copy"))
    assert torch.equal(one.ids, two.ids)
