"""The verbs generate and interactive, through the command line."""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dstrain.api import load
from dstrain.cli.main import main
from tests.paths import ROOT
from tests.unit.generation.small_bundle import SENTENCES, WORDS, make_bundle, make_decoder_only_bundle

TEXT = "\n".join(SENTENCES) + "\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("verbs") / "bundle")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text(TEXT)
    return path


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def generate(bundle: Path, *words: str | Path) -> int:
    return main(["generate", str(bundle), *map(str, words)])


def test_generate_writes_what_the_python_door_finds(
    bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.txt"
    assert generate(bundle, "--input", source, "--output", output, "--beam-size", "3", "--length-penalty", "0.2") == 0
    expected = load(bundle).generate(SENTENCES, beam_size=3, length_penalty=0.2)
    assert output.read_text().splitlines() == [hypotheses[0].text for hypotheses in expected]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{len(SENTENCES)} lines, " in captured.err
    assert "lines/s" in captured.err


def test_generate_reads_and_writes_the_standard_streams(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, TEXT.encode())
    assert generate(bundle, "--format", "jsonl", "--num-best", "3", "--no-repeat-ngram", "1", "--max-length-ratio", "0.5") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = load(bundle).generate(SENTENCES, num_best=3, no_repeat_ngram=1, max_length_ratio=0.5)
    assert [answer["line"] for answer in answers] == list(range(1, len(SENTENCES) + 1))
    assert [[h["text"] for h in answer["hypotheses"]] for answer in answers] == [[h.text for h in hs] for hs in expected]
    assert [answer["source"] for answer in answers] == SENTENCES


@pytest.mark.timeout(60)
def test_generate_reads_pipes_and_compressed_files(
    bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(bundle, "--input", source, "--reference", source, "--format", "jsonl") == 0
    expected = capsys.readouterr().out
    (tmp_path / "packed").write_bytes(lzma.compress(TEXT.encode()))
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[TEXT], daemon=True).start()
    assert generate(bundle, "--input", tmp_path / "pipe", "--reference", tmp_path / "packed", "--format", "jsonl") == 0
    assert capsys.readouterr().out == expected


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["pipe", "-"])
def test_a_stream_for_two_options_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = name if name == "-" else tmp_path / name
    assert generate(tmp_path / "no bundle", "--input", path, "--prefix", path) == 1
    assert "--input and --prefix both read" in capsys.readouterr().err


def test_generate_samples(bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("5", "5", "6"):
        assert generate(bundle, "--input", source, "--sampling", "--top-k", "9", "--top-p", "0.95", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0].splitlines()) == len(SENTENCES)


def test_a_language_model_continues_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt stays at the beginning of its line, a blank one stays blank, and both verbs draw the same for the same line."""
    model = make_decoder_only_bundle(tmp_path / "bundle", trained_on="text")
    prompts = ["eins zwei", "", "fünf", "eins zwei"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    long = ["--sampling", "--min-length", "8", "--max-length-ratio", "1", "--max-length-offset", "9"]
    outputs = []
    for seed in ("5", "5", "6"):
        assert generate(model, "--input", tmp_path / "prompts.txt", "--seed", seed, *long) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    first, blank, second, again = outputs[0].splitlines()
    assert [line[: len(prompt) + 1] for line, prompt in zip((first, second), ("eins zwei", "fünf"), strict=True)] == [
        "eins zwei ",
        "fünf ",
    ]
    assert blank == ""
    assert again.startswith("eins zwei ") and again != first
    assert min(len(line.split()) for line in (first, second, again)) >= 8
    feed(monkeypatch, (tmp_path / "prompts.txt").read_bytes())
    assert main(["interactive", str(model), "--device", "cpu", "--seed", "5", *long]) == 0
    assert capsys.readouterr().out == outputs[0]
    assert generate(model, "--input", tmp_path / "prompts.txt", "--num-best", "2", "--format", "jsonl", *long) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [[hypothesis["text"] for hypothesis in answer["hypotheses"]] for answer in answers]
    assert all(text.startswith(prompt) for prompt, pair in zip(prompts, texts, strict=True) for text in pair)


def test_generate_in_fairseq_lines_with_references(bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, "--input", source, "--reference", source, "--format", "fairseq", "--threads", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("-")[0] for line in lines] == list("STHDP") * len(SENTENCES)
    assert [line for line in lines if line.startswith("T-3")] == [f"T-3\t{SENTENCES[3]}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-best", "2"], "format text has one line per input, but num_best = 2"),
        (["--temperature", "0"], "generation options: temperature: input should be greater than 0, not 0.0"),
        (
            ["--top-k", "3"],
            "generation options: top_k (--top-k) has no effect in beam search; choose kind: sampling (--sampling)",
        ),
        (
            ["--sampling", "--groups", "2"],
            "groups (--groups) has no effect in sampling; choose kind: beam (by --beam-size, without",
        ),
        (["--diversity", "2"], "generation options: diversity has no effect in one group; give groups (--groups) too"),
        (["--input", "nowhere.en"], "nowhere.en: No such file or directory"),
        (["--reference", "nowhere.de"], "nowhere.de: No such file or directory"),
        (["--prefix", "nowhere.de"], "nowhere.de: No such file or directory"),
        (["--device", "cuda:9"], "device cuda:9: no GPU is visible here"),
        (["--score-only"], "--score-only has nothing to score; add --reference FILE"),
    ],
)
def test_generate_explains_mistakes(
    bundle: Path, source: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(bundle, "--input", source, *words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("option", ["--threads", "--beam-size", "--groups", "--num-best", "--top-k", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-2", "half"])
def test_a_number_below_one_is_a_fault_of_usage(
    bundle: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        generate(bundle, f"{option}={value}")
    assert caught.value.code == 2
    assert f"argument {option}: '{value}' is not a whole number from 1 on" in capsys.readouterr().err


def test_generate_writes_bare_sums_on_request(bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, "--input", source, "--format", "jsonl", "--score", "sum") == 0
    answers = [json.loads(line)["hypotheses"][0] for line in capsys.readouterr().out.splitlines()]
    assert [answer["score"] for answer in answers] == pytest.approx([sum(answer["token_scores"]) for answer in answers], rel=1e-5)


def test_generate_forces_prefixes(bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "prefix"
    prefixes = ["zwölf elf", "neun", "", "", "", "acht", "eins"]
    prefix.write_text("\n".join(prefixes) + "\n")
    assert generate(bundle, "--input", source, "--prefix", prefix) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == [hypotheses[0].text for hypotheses in load(bundle).generate(SENTENCES, prefixes=prefixes)]
    assert [text.startswith(first) for text, first in zip(written, prefixes, strict=True)] == [True] * len(SENTENCES)
    prefix.write_text("neun\n")
    assert generate(bundle, "--input", source, "--prefix", prefix) == 1
    assert f"in.txt {len(SENTENCES)}, {prefix} 1; give one line for each line" in capsys.readouterr().err


def test_generate_scores_the_references(bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = tmp_path / "ref.txt"
    targets = [" ".join(WORDS[: number + 1]) for number in range(len(SENTENCES))]
    reference.write_text("\n".join(targets) + "\n")
    words = ("--input", source, "--reference", reference, "--score-only", "--length-penalty", "0.5")
    expected = load(bundle).score(SENTENCES, targets, length_penalty=0.5)
    written = {}
    for name in ("text", "jsonl", "fairseq"):
        assert generate(bundle, *words, "--format", name) == 0
        written[name] = capsys.readouterr().out.splitlines()
    scores = pytest.approx([hypothesis.score for hypothesis in expected], rel=1e-6)
    assert [float(line) for line in written["text"]] == scores
    answers = [json.loads(line)["hypotheses"] for line in written["jsonl"]]
    assert [(h["text"], len(h["token_scores"])) for (h,) in answers] == [(t, len(t.split()) + 1) for t in targets]
    assert [h["score"] for (h,) in answers] == scores
    details = [line.split("\t") for line in written["fairseq"] if line.startswith("D-")]
    assert [float(score) * math.log(2) for _, score, _ in details] == scores
    assert [text for _, _, text in details] == targets


def test_scoring_and_forcing_exclude_each_other(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate(bundle, "--score-only", "--prefix", "x")
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_scored_line_that_is_too_long_is_named(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, reference = tmp_path / "in", tmp_path / "ref"
    source.write_text("one\n" * 3)
    reference.write_text("eins\neins\n" + "eins " * 30 + "\n")
    assert generate(bundle, "--input", source, "--reference", reference, "--score-only") == 1
    assert "target line 3 has 31 tokens" in capsys.readouterr().err


def test_a_long_line_is_refused_by_number_and_cut_on_request(
    bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.txt"
    source.write_text(TEXT + "one " * 30 + "\n")
    assert generate(bundle, "--input", source, "--output", output) == 1
    assert f"source line {len(SENTENCES) + 1} has 31 tokens" in capsys.readouterr().err
    assert not output.exists()
    assert generate(bundle, "--input", source, "--output", output, "--truncate") == 0
    assert "1 of 8 source lines cut to the model's 16 tokens" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == len(SENTENCES) + 1


def test_generate_without_a_tokenizer_says_so(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(make_bundle(tmp_path / "bare", with_tokenizers=False), "--input", source) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_interactive_answers_every_line_of_a_pipe(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, TEXT.encode().removesuffix(b"\n"))
    assert main(["interactive", str(bundle), "--beam-size", "2"]) == 0
    captured = capsys.readouterr()
    expected = load(bundle).generate(SENTENCES, beam_size=2)
    assert captured.out.splitlines() == [hypotheses[0].text for hypotheses in expected]
    assert ">" not in captured.err


def test_generate_and_interactive_take_a_precision(
    bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(bundle, precision="bf16")
    together, alone = model.generate(SENTENCES, beam_size=2), [model.generate([line], beam_size=2)[0] for line in SENTENCES]
    assert together[0][0].score != load(bundle).generate(SENTENCES, beam_size=2)[0][0].score
    half = ["--precision", "bf16", "--beam-size", "2", "--format", "fairseq"]
    assert generate(bundle, "--input", source, "--output", tmp_path / "out", *half) == 0
    feed(monkeypatch, TEXT.encode())
    assert main(["interactive", str(bundle), *half]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("computes in bf16 on cpu") == 2
    for output, expected in (((tmp_path / "out").read_text(), together), (printed.out, alone)):
        scores = [float(line.split("\t")[1]) for line in output.splitlines() if line.startswith("H-")]
        assert scores == pytest.approx([hypotheses[0].score / math.log(2) for hypotheses in expected], abs=1e-6)


def test_interactive_stops_at_a_fault_in_a_pipe(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"one\n\xff\ntwo\n")
    assert main(["interactive", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "standard input:2: invalid UTF-8" in captured.err


def test_output_is_utf8_in_any_locale(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dstrain", "generate", str(bundle), "--device", "cpu", "--format", "fairseq"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, input="fünf\n".encode(), capture_output=True, cwd=ROOT, env=environment, check=True)
    assert result.stdout.decode().splitlines()[0] == "S-0\tfünf"


def start_interactive(bundle: Path, stdin: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dstrain", "interactive", str(bundle), "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)


def read_line(process: subprocess.Popen[bytes], timeout: float = 60) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout)
    assert ready, "no answer while the input is still open"
    return process.stdout.readline().decode()


def test_interactive_answers_at_once_in_a_pipe(bundle: Path) -> None:
    process = start_interactive(bundle, subprocess.PIPE)
    assert process.stdin is not None
    expected = load(bundle).generate(["one two", "three"])
    for line, hypotheses in zip([b"one two\n", b"\n", b"three\n"], [expected[0], None, expected[1]], strict=True):
        process.stdin.write(line)
        process.stdin.flush()
        assert read_line(process) == ("" if hypotheses is None else hypotheses[0].text) + "\n"
    _, message = process.communicate(timeout=30)
    assert (process.returncode, message) == (0, b"")


def test_interactive_on_a_terminal_prompts_survives_a_fault_and_leaves_quietly(bundle: Path) -> None:
    terminal, stdin = pty.openpty()
    process = start_interactive(bundle, stdin)
    os.write(terminal, b"one two\n")
    assert read_line(process) == load(bundle).generate(["one two"])[0][0].text + "\n"
    os.write(terminal, b"one " * 30 + b"\n")
    os.write(terminal, b"three\n")
    assert read_line(process) == load(bundle).generate(["three"])[0][0].text + "\n"
    os.write(terminal, b"\x04")  # Ctrl-D
    _, message = process.communicate(timeout=30)
    os.close(terminal)
    os.close(stdin)
    assert process.returncode == 0
    assert message.count(b"> ") == 4
    assert b"source line 2 has 31 tokens" in message
    assert b"Traceback" not in message


def test_ctrl_c_on_a_terminal_just_ends(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    class Interrupted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Terminal(Interrupted()))
    assert main(["interactive", str(bundle)]) == 0
    assert capsys.readouterr().err == "> \n"


def test_an_interruption_of_interactive_gives_130(bundle: Path) -> None:
    process = start_interactive(bundle, subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"one two\n")
    process.stdin.flush()
    assert read_line(process).endswith("\n")
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in message
