"""How BLEU cuts text into words: one of sacreBLEU's tokenizations, or `auto`, which follows the script of the references.

BLEU compares words. 13a, sacreBLEU's default, finds them by spaces and punctuation, so a sentence of a script without spaces is
one word to it, and a good translation scores near 0. As sacreBLEU does if it knows the language, `auto` takes zh for Chinese. It
takes char, which needs no further package, for Japanese, Thai, Lao, Khmer, Burmese and Tibetan, and 13a otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from sacrebleu.metrics.bleu import BLEU

from dstrain.config_base import BleuTokenization
from dstrain.errors import DataError, nearest

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_OTHERS = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d"
"""Thai and Lao, Tibetan, Burmese, Khmer, kana."""
_BY_SPACES = ("13a", "intl", "none")


def choose_tokenization(name: str, references: Iterable[str]) -> str:
    """The tokenization of that name, `auto` by the script of most letters of the references.

    Raises DataError if it is unknown or cannot be used here.
    """
    check_tokenization(name)
    return _fitting("\n".join(references)) if name == "auto" else name


def doubtful_tokenization(name: str, references: Iterable[str]) -> str | None:
    """A warning if the tokenization finds words by spaces where there are next to none."""
    text = "\n".join(references)
    fitting = _fitting(text)
    if name not in _BY_SPACES or fitting == "13a" or text.count(" ") * 10 > sum(map(str.isalpha, text)):
        return None
    return (
        f"tokenize = {name} finds words by spaces, but the references have next to none, so BLEU stays near 0 however good the "
        f"translations are; use {fitting} or auto"
    )


def _fitting(text: str) -> str:
    chinese, others = (len(re.findall(f"[{script}]", text)) for script in (_CHINESE, _OTHERS))
    by_spaces = sum(map(str.isalpha, re.sub(f"[{_CHINESE}{_OTHERS}]", "", text)))
    if chinese + others <= by_spaces:
        return "13a"
    return "zh" if chinese > 4 * others else "char"  # a fifth of Japanese and more is kana


def check_tokenization(name: str) -> None:
    """Raise DataError if it is unknown, or needs a package or a file that is not here. Some are downloaded once."""
    if name != "auto":
        build_bleu(name, lowercase=False)


def build_bleu(name: str, *, lowercase: bool) -> BLEU:
    """sacreBLEU's BLEU with the tokenization of that name, not `auto`. Raises DataError as `check_tokenization`."""
    if name not in BLEU.TOKENIZERS:
        raise DataError(f"unknown BLEU tokenization {name!r}; {nearest(name, get_args(BleuTokenization))}")
    try:
        return BLEU(lowercase=lowercase, tokenize=name)
    except (RuntimeError, OSError, ImportError, AssertionError, SystemExit) as error:  # all of them are raised by sacreBLEU
        reason = " ".join(str(error).split()).split(". ")[0]
        raise DataError(f"BLEU tokenization {name!r} cannot be used here: {reason}; {_REMEDIES.get(name, _FILE)}") from error


_FILE = (
    "it needs a file that is downloaded once, into ~/.sacrebleu or $SACREBLEU: use it once where there is a network, or choose "
    "auto, 13a, zh or char"
)
_REMEDIES = {
    "ja-mecab": 'pip install "sacrebleu[ja]", or choose char',
    "ko-mecab": 'pip install "sacrebleu[ko]", or choose 13a',
}
