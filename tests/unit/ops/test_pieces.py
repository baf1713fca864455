"""Pieces of a tensor and their gradient beside `torch.split`."""

import pytest
import torch
from torch import Tensor

from dstrain.ops.pieces import split, whole

SIZES = [4, 2, 3]


class Buffer(torch.autograd.Function):
    """Of pieces, whose gradients are given."""

    grads: tuple[Tensor, ...]

    @staticmethod
    def forward(ctx, *pieces: Tensor) -> Tensor:
        return sum(piece.sum() for piece in pieces)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return Buffer.grads


def gradient(grads: tuple[Tensor, ...]) -> Tensor:
    """What a tensor of these pieces gets."""
    Buffer.grads = grads
    x = torch.randn(*grads[0].shape[:-1], sum(SIZES), requires_grad=True)
    return torch.autograd.grad(Buffer.apply(*split(x, SIZES)), x)[0]


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 5, 9), (1, 5, 9), (2, 1, 9), (1, 1, 9)])
def test_adjacent_gradients_are_not_copied(shape: tuple[int, ...]) -> None:
    buffer = torch.randn(3, *shape)[1]  # in the midst of its memory
    grad = gradient(torch.split(buffer, SIZES, -1))
    assert grad.data_ptr() == buffer.data_ptr()
    assert torch.equal(grad, buffer)
    assert grad.is_contiguous()


def test_nor_if_they_come_through_heads() -> None:
    buffer = torch.randn(2, 5, 3, 4, 6)  # (B, T, pieces, H, K)
    parts = [buffer[:, :, piece].transpose(1, 2) for piece in range(3)]
    x = torch.randn(2, 5, 72, requires_grad=True)
    Buffer.grads = tuple(parts)
    heads = (piece.view(2, 5, 4, 6).transpose(1, 2) for piece in split(x, [24] * 3))
    grad = torch.autograd.grad(Buffer.apply(*heads), x)[0]
    assert grad.data_ptr() == buffer.data_ptr()
    assert torch.equal(grad, buffer.view(2, 5, 72))


def others() -> dict[str, tuple[Tensor, ...]]:
    """Gradients that are not the pieces of one tensor, though some are nearly so."""
    buffer = torch.randn(2, 5, 9)
    first, second, third = torch.split(buffer, SIZES, -1)
    last = torch.split(torch.randn(2, 5, 12), [4, 2, 3, 3], -1)[:3]
    apart = torch.split(torch.randn(2, 5, 10), [4, 1, 2, 3], -1)
    transposed = torch.split(torch.randn(5, 2, 9).transpose(0, 1), SIZES, -1)
    return {
        "own memory": (first.clone(), second.clone(), third.clone()),
        "one of its own": (first, second, third.clone()),
        "of a wider tensor": last,
        "with a gap": (apart[0], apart[2], apart[3]),
        "of other rows": (first, second, buffer.roll(1, 0)[..., 6:]),
        "transposed": transposed,
        "of one number": tuple(torch.ones(()).expand(2, 5, size) for size in SIZES),
        "in another order": (torch.split(buffer, [2, 4, 3], -1)[1], buffer[..., :2], third),
    }


@pytest.mark.parametrize("name", others())
def test_other_gradients_are_concatenated(name: str) -> None:
    grads = others()[name]
    assert whole(grads) is None
    assert torch.equal(gradient(grads), torch.cat(grads, -1))


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 1, 2), (0, 0, 2)])
def test_gradients_of_the_pieces_that_are_used(used: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    grads = []
    for function in (split, lambda x, sizes: torch.split(x, sizes, dim=-1)):
        pieces = function(x, SIZES)
        grads.append(torch.autograd.grad(sum(pieces[index].sin().sum() * (n + 1) for n, index in enumerate(used)), x)[0])
    assert torch.equal(*grads)


def test_pieces_are_views() -> None:
    for requires_grad in (False, True):
        x = torch.randn(2, 5, 9, requires_grad=requires_grad)
        pieces = split(x, SIZES)
        assert [piece.data_ptr() - x.data_ptr() for piece in pieces] == [0, 16, 24]
        assert [piece.requires_grad for piece in pieces] == [requires_grad] * 3


def test_no_elements() -> None:
    x = torch.randn(0, 9, requires_grad=True)
    assert torch.autograd.grad(sum(piece.sum() for piece in split(x, SIZES)), x)[0].shape == (0, 9)


def test_autocast_and_compilation() -> None:
    torch._dynamo.reset()
    x = torch.randn(5, 9, requires_grad=True)
    compiled = torch.compile(split, backend="eager", fullgraph=True)
    for function in (split, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            pieces = function(x.bfloat16(), SIZES)
            grad = torch.autograd.grad(pieces[0].float().square().sum() + pieces[2].float().sum(), x)[0]
        expected = torch.cat([2 * x[:, :4].bfloat16().float(), torch.zeros(5, 2), torch.ones(5, 3)], 1)
        torch.testing.assert_close(grad, expected.bfloat16().float(), rtol=0, atol=0)
    torch._dynamo.reset()
