import bz2
import gzip
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.evaluation.metrics.corpus import corpus_scores

HYPOTHESES = ["ein Hund läuft über die Straße .", "", "zwei zwei Männer sitzen auf einer Bank ."]
REFERENCES = ["ein Hund rennt über die Straße .", "nichts", "zwei Männer sitzen auf einer Bank ."]
SECOND = ["ein Hund läuft auf der Straße .", "nichts", "Zwei Herren sitzen auf einer Bank ."]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "hyp.de").write_text("\n".join(HYPOTHESES) + "\n", encoding="utf-8")
    (tmp_path / "test.de").write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    (tmp_path / "second.de.gz").write_bytes(gzip.compress("\n".join(SECOND).encode()))
    return tmp_path


def evaluate(files: Path, *arguments: str, reference: str = "test.de") -> int:
    return main(["evaluate", "--hypothesis", f"{files / 'hyp.de'}", "--reference", f"{files / reference}", *arguments])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("D-0\t-0.5\tein Hund", r"hyp\.de has fairseq's lines; score its sentences: grep \^D- "),
        ('{"line": 1, "source": "a"}', r"hyp\.de has JSON lines; score its sentences: jq "),
    ],
)
def test_answers_that_are_no_sentences_are_not_scored(
    files: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "hyp.de").write_text(f"{line}\n" * len(REFERENCES))
    assert evaluate(files) == 1
    assert re.search(message, capsys.readouterr().err)


def test_text_has_a_line_per_score_with_its_signature(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["BLEU", "chrF2", "TER", "repetition"]
    for line, score in zip(lines, corpus_scores(HYPOTHESES, REFERENCES), strict=False):
        assert line.split()[1:3] == [f"{score.value:.2f}", score.signature]
    assert lines[3].split()[1] == f"{100 * 1 / 15:.2f}"


def test_json_has_full_precision(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--reference", f"{files / 'second.de.gz'}", "--lowercase", "--tokenize", "intl", "--format", "json"]
    assert evaluate(files, *options) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = corpus_scores(HYPOTHESES, REFERENCES, SECOND, lowercase=True, tokenize="intl")
    assert [(each["name"], each["value"], each["signature"]) for each in printed[:3]] == [
        (score.name, score.value, score.signature) for score in expected
    ]
    assert printed[3]["name"] == "repetition"


def fails_with(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_missing_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(files, reference="absent.de") == 1
    fails_with(f"{files / 'absent.de'}: No such file or directory; check the path", capsys)


def test_unequal_numbers_of_lines(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "short.de").write_text("eins\nzwei")
    assert evaluate(files, reference="short.de") == 1
    fails_with(f"{files / 'hyp.de'} has 3 lines, {files / 'short.de'} has 2: line 3 has no reference; give files", capsys)


def test_a_blank_line_is_no_reference(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file may lack a line that another has; a line that none has is named."""
    second: list[str | None] = [SECOND[0], None, SECOND[2]]
    (files / "some.de").write_text(f"{SECOND[0]}\n \n{SECOND[2]}\n", encoding="utf-8")
    assert evaluate(files, "--reference", f"{files / 'some.de'}", "--rouge", "plain") == 0
    lines = capsys.readouterr().out.splitlines()
    metrics = ("bleu", "chrf", "ter", "repetition")
    expected = corpus_scores(HYPOTHESES, REFERENCES, second, metrics=metrics, rouge="plain")
    assert [line.split()[0] for line in lines] == ["BLEU", "chrF2", "TER", "repetition", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert [line.split()[1:3] for line in lines] == [[f"{score.value:.2f}", score.signature] for score in expected]
    assert evaluate(files, reference="some.de") == 1
    fails_with("line 2 has no reference; give it one, or leave the line out everywhere", capsys)


@pytest.mark.timeout(30)
def test_pipes_and_standard_input_are_read_once(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(files) == 0
    expected = capsys.readouterr().out
    os.mkfifo(files / "pipe")
    threading.Thread(target=(files / "pipe").write_bytes, args=[(files / "test.de").read_bytes()], daemon=True).start()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bz2.compress((files / "hyp.de").read_bytes()))))
    assert main(["evaluate", "--hypothesis", "-", "--reference", f"{files / 'pipe'}"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.timeout(30)
def test_a_pipe_for_two_options_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(files / "pipe")
    assert evaluate(files, "--reference", f"{files / 'pipe'}", reference="pipe") == 1
    fails_with(f"--reference 1 and --reference 2 both read {files / 'pipe'}, which can be read only once; name a file", capsys)


def test_invalid_utf8_names_file_and_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "latin1.de").write_bytes("eins\nzwei\nStraße\n".encode("latin-1"))
    assert evaluate(files, reference="latin1.de") == 1
    fails_with(f"{files / 'latin1.de'}:3: invalid UTF-8 (byte 0xdf)", capsys)


def test_empty_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "hyp.de").write_bytes(b"")
    (files / "test.de").write_bytes(b"")
    assert evaluate(files) == 1
    fails_with("there is nothing to score: the hypotheses hold no line", capsys)


def test_an_unknown_tokenization(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate(files, "--tokenize", "13b")
    fails_with("argument --tokenize: '13b' is unknown; did you mean 13a?", capsys)


def test_unicode_line_separators_do_not_split_a_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hyp.de", "test.de"):
        (files / name).write_text(
            "ein\u2028Hund läuft über die Straße\nein\x0cHund läuft über die\x85Straße\r\n", encoding="utf-8", newline=""
        )
    assert evaluate(files) == 0
    assert capsys.readouterr().out.split()[1] == "100.00"


def test_text_without_spaces_is_scored_by_its_script_and_a_choice_that_cannot_is_a_warning(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("hyp.de", "test.de"):
        (files / name).write_text("他看见一座红房子。\n老师买那本旧书。\n", encoding="utf-8")
    assert evaluate(files) == 0
    captured = capsys.readouterr()
    assert captured.out.split()[1] == "100.00"
    assert "|tok:zh|" in captured.out
    assert captured.err == ""
    assert evaluate(files, "--tokenize", "13a") == 0
    captured = capsys.readouterr()
    assert captured.out.split()[1] == "0.00"
    assert "tokenize = 13a finds words by spaces" in captured.err
