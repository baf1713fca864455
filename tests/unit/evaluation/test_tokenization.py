"""How BLEU finds words: by name, or by the script of the references; and what is said if it cannot."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path
from typing import Any, get_args

import pytest
from sacrebleu.metrics.bleu import BLEU

from dstrain.config_base import BleuTokenization
from dstrain.errors import DataError
from dstrain.evaluation.metrics.corpus import corpus_scores
from dstrain.evaluation.metrics.tokenization import check_tokenization, choose_tokenization, doubtful_tokenization

CHINESE = ["他看见一座红房子。", "老师买那本旧书。"]
TEXTS = {
    "zh": CHINESE,
    "char": ["彼は赤い家を見る。", "先生は古い本を買います。"],
    "13a": ["A red house .", "An old book ."],
}


def test_every_name_of_sacrebleu_and_no_other_can_be_chosen() -> None:
    assert set(get_args(BleuTokenization)) == {"auto", *BLEU.TOKENIZERS}


@pytest.mark.parametrize("name", TEXTS)
def test_auto_follows_the_script(name: str) -> None:
    assert choose_tokenization("auto", TEXTS[name]) == name


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["บ้านสีแดง"], "char"),
        (["ကျွန်တော်"], "char"),
        (["ផ្ទះក្រហម"], "char"),
        (["빨간 집을 본다 ."], "13a"),
        (["घर लाल है ।"], "13a"),
        (["Он видит 红 дом"], "13a"),
        (["DeepSpeed 是微软的一个开源的深度学习优化库"], "zh"),
        ([""], "13a"),
        ([], "13a"),
    ],
)
def test_the_script_of_most_letters_decides(lines: list[str], name: str) -> None:
    assert choose_tokenization("auto", lines) == name


@pytest.mark.parametrize(("lines", "name"), [(CHINESE, "zh"), (TEXTS["char"], "char")])
def test_a_perfect_translation_scores_100(lines: list[str], name: str) -> None:
    chosen = choose_tokenization("auto", lines)
    (perfect,) = corpus_scores(lines, lines, metrics=("bleu",), tokenize=chosen)
    assert perfect.value == pytest.approx(100)
    assert f"|tok:{name}|" in perfect.signature
    assert corpus_scores(lines, lines, metrics=("bleu",), tokenize="13a")[0].value == 0


def test_words_that_no_space_separates_are_a_warning() -> None:
    warning = doubtful_tokenization("13a", CHINESE)
    assert warning is not None
    assert warning.startswith("tokenize = 13a finds words by spaces, but the references have next to none")
    assert warning.endswith("use zh or auto")
    for name, lines in (("13a", ["他 看见 一座 红 房子 。"]), ("char", CHINESE), ("13a", TEXTS["13a"])):
        assert doubtful_tokenization(name, lines) is None


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="unknown BLEU tokenization '13b'; did you mean 13a"):
        check_tokenization("13b")
    with pytest.raises(DataError, match="unknown BLEU tokenization 'moses'; valid: 13a, auto, char, "):
        corpus_scores(["a"], ["a"], tokenize="moses")


@pytest.mark.parametrize(("name", "module", "extra"), [("ja-mecab", "MeCab", "ja"), ("ko-mecab", "mecab_ko", "ko")])
def test_a_package_that_is_missing(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.tokenizer_{name.replace('-', '_')}", raising=False)
    with pytest.raises(DataError, match=rf"'{name}' cannot be used here: .*; pip install \"sacrebleu\[{extra}\]\""):
        check_tokenization(name)


@pytest.mark.parametrize("failure", [OSError("no such host"), SystemExit(1)])
def test_a_file_that_cannot_be_downloaded(failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"'flores200' cannot be used here: .*; it needs a file that is downloaded once"):
        check_tokenization("flores200")
