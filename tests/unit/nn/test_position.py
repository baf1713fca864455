"""Position vectors: the sinusoidal formula, the limits of learned ones, offsets and explicit numbers."""

import math

import pytest
import torch

from dstrain.errors import DataError
from dstrain.nn import position
from dstrain.nn.position import LearnedPositions, NoPositions, SinusoidalPositions

LIKE = torch.zeros(1)


@pytest.mark.parametrize("dim", [2, 7, 32])
def test_sinusoids_follow_the_formula(dim: int) -> None:
    table = SinusoidalPositions(dim)(0, 12, LIKE)
    half = dim // 2
    for place in (0, 1, 11):
        for i in range(half):
            angle = (place + 2) * math.exp(-i * math.log(10000) / max(half - 1, 1))
            assert table[place, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, half + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    if dim % 2:
        assert table[:, -1].eq(0).all()


@pytest.mark.parametrize("part", [SinusoidalPositions(6), LearnedPositions(40, 6)])
def test_offsets_and_numbers_agree(part: SinusoidalPositions | LearnedPositions) -> None:
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    whole = part(0, 30, LIKE)
    torch.testing.assert_close(part(7, 12, LIKE), whole[7:12])
    for numbers in (torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]), torch.tensor([0, 1, 2, 3, 4, 0, 1])):
        torch.testing.assert_close(part(numbers, 5, LIKE), whole[numbers])


def test_the_table_grows_on_demand_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(position, "sinusoids", lambda rows, dim, make=position.sinusoids: made.append(rows) or make(rows, dim))
    part = SinusoidalPositions(4)
    for offset in range(300):
        part(offset, offset + 1, LIKE)
    assert made == [256, 512]
    assert part(torch.tensor([[5002]]), 5003, LIKE).shape == (1, 1, 4)
    assert made[2:] == [8192]


def test_the_table_is_no_state_and_outlives_inference_mode() -> None:
    part = SinusoidalPositions(4)
    assert part.state_dict() == {}
    with torch.inference_mode():
        part(0, 3, LIKE)
    assert not part(0, 3, LIKE).is_inference()
    assert part.bfloat16()(0, 3, LIKE.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(part(0, 3, LIKE), SinusoidalPositions(4)(0, 3, LIKE))


def test_learned_positions_end() -> None:
    part = LearnedPositions(8, 4)
    assert part(3, 8, LIKE).shape == (5, 4)
    with pytest.raises(DataError, match=r"a sequence of 9 tokens is longer than the 8 learned positions.*max_source_length"):
        part(4, 9, LIKE)
    with pytest.raises(DataError, match="a sequence of 9 tokens is longer than the 8 learned positions"):
        part(torch.tensor([0, 8]), 9, LIKE)


def test_none_adds_nothing() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(x + NoPositions()(0, 3, x), x)
