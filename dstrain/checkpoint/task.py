"""The task of a model for a line of text, which each bundle states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dstrain.data.config import is_text_tree
from dstrain.models.config import ModelConfig

BundleTask = Literal["translation", "continuation"]
"""translation: a line is a source, and the model writes its target. continuation: a line is the beginning of a text."""


def task_of(model: ModelConfig, recipe: Mapping[str, Any] | None) -> BundleTask:
    """The task of a model that was trained by `recipe`; an imported one has none.

    A decoder-only model continues unless a corpus of its training has sources, of its own or made by a task. Bundles that were
    written before they stated their task are read by this rule, too.
    """
    corpora = (recipe or {}).get("data", {}).get("train", ())
    return "continuation" if model.kind == "decoder_only" and all(map(_is_continued, corpora)) else "translation"


def _is_continued(corpus: Mapping[str, Any]) -> bool:
    """Whether the examples of a corpus have no source; recipes from before there were tasks name none."""
    task = corpus.get("task") or {"kind": "language_modeling"}
    return is_text_tree(corpus) and task["kind"] == "language_modeling"
