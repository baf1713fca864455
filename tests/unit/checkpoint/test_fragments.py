"""Reading plans equal a brute-force copy through the whole tensor, for any way to slice and cut it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dstrain.checkpoint.fragments import Span, plan_reads
from dstrain.checkpoint.tensor_file import TensorFile, file_order, info_of, write_tensors
from dstrain.errors import CheckpointError
from dstrain.fragment import DimensionSlice

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def elements(span: Span) -> npt.NDArray[np.int64]:
    """Numbers of the elements of a fragment in the flattened whole tensor, by indexing a numbered tensor."""
    whole = np.arange(math.prod(span.shape)).reshape(span.shape)
    if span.slice is not None:
        whole = whole.take(range(span.slice.start, span.slice.stop), axis=span.slice.dim)
    return whole.reshape(-1)[span.start : span.start + span.length]


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """[start, stop) ranges that tile [0, size), some of them empty."""
    inner = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    edges = [0, *inner, size]
    return list(pairwise(edges))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Span]:
    """Fragments that hold each element once: slices along one dimension, each cut into flat ranges, in any order."""
    slices: list[DimensionSlice | None] = [None]
    if shape and draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        slices = [DimensionSlice(dim, start, stop) for start, stop in draw(cuts(shape[dim]))]
    spans = []
    for part in slices:
        size = len(elements(Span(shape, 0, math.prod(shape), part)))
        spans += [Span(shape, start, stop - start, part) for start, stop in draw(cuts(size))]
    return draw(st.permutations(spans))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_tiling_is_read_from_any_other(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    stored, needed = data.draw(tilings(shape)), data.draw(tilings(shape))
    for span in needed:
        expected = elements(span)
        found = np.full(len(expected), -1)
        for source, source_offset, offset, length in plan_reads("w", span, stored):
            assert (found[offset : offset + length] == -1).all(), "no element is read twice"
            found[offset : offset + length] = elements(stored[source])[source_offset : source_offset + length]
        assert found.tolist() == expected.tolist()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_hole_and_an_overlap_are_errors(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    stored = [span for span in data.draw(tilings(shape)) if span.length]
    whole = Span(shape, 0, math.prod(shape))
    lost = data.draw(st.sampled_from(stored))
    rest = [span for span in stored if span is not lost]
    with pytest.raises(CheckpointError, match=rf"^w: element {elements(lost).min()} is not stored$"):
        plan_reads("w", whole, rest)
    with pytest.raises(CheckpointError, match=r"^w: element \d+ is stored twice$"):
        plan_reads("w", whole, [*stored, lost])


@pytest.mark.parametrize(
    "span",
    [
        Span((3, 4), 0, 13),
        Span((3, 4), -1, 2),
        Span((3, 4), 0, 7, DimensionSlice(1, 0, 2)),
        Span((3, 4), 0, 1, DimensionSlice(2, 0, 1)),
        Span((3, 4), 0, 1, DimensionSlice(1, 3, 5)),
        Span((0, 4), 0, 1),
        Span((3, 4), 0, 1, DimensionSlice(1, 2, 2)),
    ],
)
def test_a_fragment_that_leaves_its_tensor_is_refused(span: Span) -> None:
    with pytest.raises(CheckpointError, match="leaves its tensor"):
        list(span.runs())


def test_another_shape_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^w was saved with shape \[4\], but this run needs \[2, 2\]$"):
        plan_reads("w", Span((2, 2), 0, 4), [Span((4,), 0, 4)])


TENSORS = {
    "b/é": torch.randn(3, 5),
    "a": torch.randn(7, dtype=torch.float64),
    "z": torch.randn(2, 2).bfloat16(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3),
    'quote"\n': torch.arange(5, dtype=torch.uint8),
}


def write(path: Path) -> None:
    infos = {name: info_of(tensor) for name, tensor in TENSORS.items()}
    size, _ = write_tensors(path, infos, (TENSORS[name] for name in file_order(infos)))
    assert path.stat().st_size == size


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    save_file(TENSORS, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "ours").items())


def test_ranges_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        for name, tensor in TENSORS.items():
            for start in range(tensor.numel()):
                values = torch.empty(tensor.numel() - start, dtype=tensor.dtype)
                file.read_into(name, start, values)
                assert torch.equal(values, tensor.flatten()[start:])
        with pytest.raises(CheckpointError, match="does not fit"):
            file.read_into("a", 1, torch.empty(7, dtype=torch.float64))
        with pytest.raises(CheckpointError, match="holds no tensor missing"):
            file.read_into("missing", 0, torch.empty(1))


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]", b"\x80\x04\x95"])
def test_what_is_no_safetensors_file_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/file is not a safetensors file: "):
        TensorFile(tmp_path / "file")
