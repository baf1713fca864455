"""A logit store without files: what a codec keeps of a teacher's distribution, and gives back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import TypeAdapter

from dstrain.batch import Batch
from dstrain.distillation.signals import SignalRequest
from dstrain.distillation.store.codec import build_codec
from dstrain.distillation.store.dump import select_in_chunks, token_keys
from dstrain.distillation.store.manifest import Method
from dstrain.engine.teacher_engine import TeacherEngine
from dstrain.model_output import ActivationCapture
from dstrain.ops.teacher_signal import KeptSignal


class StoredSignals:
    """Implements `distillation.signals.SignalSource`; the same signal of a token wherever it is asked for."""

    def __init__(self, teacher: TeacherEngine, method: dict[str, object], vocab_size: int) -> None:
        self.teacher = teacher
        self.method: Method = TypeAdapter(Method).validate_python(method)
        self.codec = build_codec(self.method, vocab_size)

    def require(self, request: SignalRequest) -> None:
        """Any."""

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[KeptSignal]:
        with self.teacher.open(batch) as (features, weight), torch.no_grad():
            selected = select_in_chunks(
                features,
                weight,
                codec=self.codec,
                keys=token_keys(batch),
                temperature=self.method.temperature,
                size=16,
                vocabulary=None,
            )
        columns = self.codec.pack([kept.numpy() for kept in selected])
        yield self.codec.unpack({name: [column.values] for name, column in columns.items()}, batch.num_targets)

    def close(self) -> None:
        self.teacher.close()
