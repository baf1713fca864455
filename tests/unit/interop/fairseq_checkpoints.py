"""Small checkpoints as fairseq writes them, with the statistics that it pickles beside the model."""

import sys
import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SMALL = {
    "arch": "transformer",
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
}
TRAINING = {
    "criterion": "label_smoothed_cross_entropy",
    "label_smoothing": 0.2,
    "optimizer": "adam",
    "adam_betas": "(0.9, 0.98)",
    "adam_eps": 1e-9,
    "weight_decay": 0.001,
    "lr": [0.002],
    "lr_scheduler": "inverse_sqrt",
    "warmup_updates": 30,
    "warmup_init_lr": 1e-7,
    "max_tokens": 300,
    "update_freq": [2],
    "max_update": 40,
    "clip_norm": 0.5,
    "dropout": 0.25,
    "seed": 5,
}
NORMS = {"encoder": ["self_attn_layer_norm", "final_layer_norm"]}
NORMS["decoder"] = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]


def small_weights(*, source: int = 11, target: int = 13, version: float | None = 3.0) -> dict[str, Tensor]:
    """State of the 1 + 1 layer transformer of `SMALL`, by fairseq's names."""
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(*shape)

    for side, size in (("encoder", source), ("decoder", target)):
        if version is not None:
            weights[f"{side}.version"] = torch.tensor([version])
        add(f"{side}.embed_tokens.weight", size, 8)
        layer = f"{side}.layers.0"
        for attention in ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn"):
            for block in ("k_proj", "v_proj", "q_proj", "out_proj"):
                add(f"{layer}.{attention}.{block}.weight", 8, 8)
                add(f"{layer}.{attention}.{block}.bias", 8)
        for norm in NORMS[side]:
            add(f"{layer}.{norm}.weight", 8)
            add(f"{layer}.{norm}.bias", 8)
        for name, rows, columns in (("fc1", 16, 8), ("fc2", 8, 16)):
            add(f"{layer}.{name}.weight", rows, columns)
            add(f"{layer}.{name}.bias", rows)
    add("decoder.output_projection.weight", target, 8)
    return weights


class AbsentModules:
    """Classes under names of modules that are not installed; `forget` removes them before a file is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: set[str] = set()

    def add(self, name: str, base: type = object) -> Any:
        """A class of that qualified name."""
        module, _, attribute = name.rpartition(".")
        parts = module.split(".")
        for package in (".".join(parts[: end + 1]) for end in range(len(parts))):
            self.names.add(package)
            self.monkeypatch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
        cls = type(attribute, (base,), {"__module__": module})
        setattr(sys.modules[module], attribute, cls)
        return cls

    def forget(self) -> None:
        """Remove the modules."""
        for name in self.names:
            self.monkeypatch.delitem(sys.modules, name, raising=False)

    def statistics(self) -> dict[str, Any]:
        """What a training leaves beside the model: meters, an optimizer, its history."""
        meters = OrderedDict()
        for name in ("meters.AverageMeter", "meters.StopwatchMeter", "meters.TimeMeter", "logging.meters.AverageMeter"):
            meter = meters[name] = self.add(f"fairseq.{name}")()
            meter.avg, meter.sum, meter.count = 2.5, torch.tensor(5.0), 2
        by_name = self.add("fairseq.logging.meters.MetersDict", OrderedDict)(meters)
        return {
            "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 4, "optimizer": meters}],
            "extra_state": {"train_meters": meters, "metrics": by_name, "val_loss": 3.0},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "task_state": {},
            "criterion": None,
        }

    def old_checkpoint(self, path: Path, weights: dict[str, Tensor], **args: Any) -> Path:
        """As of fairseq 0.6 to 0.9: one flat namespace, half precision, no zip."""
        half = {name: tensor.half() for name, tensor in weights.items()}
        content = {"args": Namespace(**SMALL, **TRAINING, **args), "model": OrderedDict(half), **self.statistics()}
        torch.save(content, path, _use_new_zipfile_serialization=False)
        self.forget()
        return path

    def new_checkpoint(self, path: Path, weights: dict[str, Tensor], task: dict[str, Any], *, omegaconf: bool = False) -> Path:
        """As of fairseq 0.10 to 0.12: groups, as dictionaries or as omegaconf's objects."""
        groups: dict[str, Any] = {
            "_name": None,
            "common": {"seed": TRAINING["seed"], "fp16": False, "log_interval": 100},
            "dataset": {"max_tokens": TRAINING["max_tokens"], "batch_size": None},
            "optimization": {name: TRAINING[name] for name in ("lr", "update_freq", "max_update", "clip_norm")},
            "model": Namespace(**SMALL, dropout=TRAINING["dropout"]),
            "task": task,
            "criterion": {"_name": TRAINING["criterion"], "label_smoothing": TRAINING["label_smoothing"]},
            "optimizer": {"_name": "adam", "lr": "${optimization.lr}"}
            | {name: TRAINING[name] for name in ("adam_betas", "adam_eps", "weight_decay")},
            "lr_scheduler": {"_name": "inverse_sqrt"} | {name: TRAINING[name] for name in ("warmup_updates", "warmup_init_lr")},
        }
        if not omegaconf:
            groups["optimizer"]["lr"] = TRAINING["lr"]
        content = {"args": None, "cfg": self._configured(groups) if omegaconf else groups, "model": weights, **self.statistics()}
        torch.save(content, path)
        self.forget()
        return path

    def _configured(self, value: Any) -> Any:
        """As omegaconf 2 keeps a tree: objects with `_content` and `_metadata`, values in `_val`."""
        kind = {dict: "dictconfig.DictConfig", list: "listconfig.ListConfig"}.get(type(value), "nodes.AnyNode")
        cls = getattr(sys.modules.get(f"omegaconf.{kind.partition('.')[0]}"), kind.partition(".")[2], None)
        node = (cls or self.add(f"omegaconf.{kind}"))()
        metadata = getattr(sys.modules.get("omegaconf.base"), "Metadata", None) or self.add("omegaconf.base.Metadata")
        node._metadata, node._parent = metadata(), None
        node._metadata.ref_type, node._metadata.object_type = Any, dict
        if isinstance(value, dict):
            node._content = {name: self._configured(item) for name, item in value.items()} | {"never_given": "???"}
        elif isinstance(value, list):
            node._content = [self._configured(item) for item in value]
        else:
            node._val = value
        return node


def dictionaries(folder: Path, source: int, target: int, languages: tuple[str, str] = ("en", "de")) -> Path:
    """dict.*.txt of these sizes, the four specials counted: word0, word1, ..."""
    folder.mkdir(exist_ok=True)
    for language, size in zip(languages, (source, target), strict=True):
        (folder / f"dict.{language}.txt").write_text("".join(f"word{number} 1\n" for number in range(size - 4)))
    return folder
