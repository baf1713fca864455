"""The task of text from the options of fairseq's denoising."""

from __future__ import annotations

from dstrain.config_base import Tree
from dstrain.interop.fairseq.command_line.notes import Notes
from dstrain.interop.fairseq.options import Settings

UNITS = {"subword": "token", "word": "word", "span-poisson": "word"}
"""Of --mask-length."""
REPLACEMENTS = {-1: "token", 0: "nothing", 1: "span"}
"""Of --replace-length."""
GPT2_FULL_STOP = "13"


def denoising_task(settings: Settings, notes: Notes) -> Tree:
    """`data.*.task`. Raises ImportFormatError for values that fairseq refuses as well."""
    length, replace = settings["mask_length"], settings["replace_length"]
    if length not in UNITS:
        raise notes.refusal("mask_length", length, f"it is none of {', '.join(UNITS)}")
    if replace not in REPLACEMENTS or (length == "subword" and replace == -1 and settings["mask"]):
        raise notes.refusal("replace_length", replace, "fairseq takes 0 or 1, and -1 unless --mask-length is subword")
    task: Tree = {"kind": "denoising", "permute_sentences": max(settings["permute_sentences"], 0.0), "mask": settings["mask"]}
    if settings["mask"]:
        poisson = settings["poisson_lambda"] if length == "span-poisson" else None
        task |= {"unit": UNITS[length], "poisson_lambda": poisson, "replace": REPLACEMENTS[replace]}
        notes.differ(settings.shown("mask"), "mask")
    task |= {"insert": settings["insert"], "rotate": settings["rotate"]}
    if task["insert"] or (task["mask"] and replace):
        task["random"] = settings["mask_random"]
        notes.reads("--task denoising", "mask-token")
    if not settings.has("rotate"):
        notes.reads("no --rotate", "rotate")
    if task["permute_sentences"]:
        if settings["bpe"] == "gpt2":
            task["sentence_ends"] = [GPT2_FULL_STOP]
        else:
            notes.differ(settings.shown("permute_sentences"), "permute-sentences")
    return task
