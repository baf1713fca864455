"""The input stage and the projection."""

import math

import pytest
import torch
from torch import nn

from dstrain.nn.dropout import Dropout
from dstrain.nn.embedding import InputEmbedding, Projection, TokenEmbedding, logits
from dstrain.nn.linear import Linear
from dstrain.nn.position import SinusoidalPositions


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(9)])
def test_scale_position_norm_in_this_order(scaled: bool, norm: nn.Module) -> None:
    tokens, positions = TokenEmbedding(20, 9), SinusoidalPositions(9)
    nn.init.normal_(tokens.weight)
    part = InputEmbedding(tokens=tokens, positions=positions, norm=norm, dropout=Dropout(0.0), model_dim=9, scaled=scaled)
    ids = torch.randint(0, 20, (3, 5))
    expected = norm(tokens.weight[ids] * (math.sqrt(9) if scaled else 1) + positions(2, 7, tokens.weight))
    torch.testing.assert_close(part(ids, 2, 7), expected, rtol=1e-5, atol=1e-6)


def test_dropout_comes_last_and_in_training_only() -> None:
    tokens = TokenEmbedding(20, 8)
    nn.init.ones_(tokens.weight)
    part = InputEmbedding(
        tokens=tokens, positions=SinusoidalPositions(8), norm=nn.LayerNorm(8), dropout=Dropout(0.5), model_dim=8, scaled=True
    )
    ids = torch.zeros(4, 6, dtype=torch.int64)
    assert (part(ids, 0, 6) == 0).any()
    assert not (part.eval()(ids, 0, 6) == 0).any()


def test_the_output_projection_comes_before_the_activation_and_the_matrix() -> None:
    output_proj = Linear(7, 4, bias=False)
    nn.init.normal_(output_proj.weight)
    table, hidden = nn.Parameter(torch.randn(11, 4)), torch.randn(3, 7)
    projection = Projection(table, activation=torch.tanh, output_proj=output_proj)
    torch.testing.assert_close(projection(hidden, logits), torch.tanh(hidden @ output_proj.weight.T) @ table.T)


def test_projection_hands_out_features_and_the_tied_parameter() -> None:
    table = nn.Parameter(torch.randn(11, 4))
    projection = Projection(table)
    hidden = torch.randn(3, 4)
    seen = []
    assert projection(hidden, lambda features, weight, vocabulary: seen.append((features, weight)) or 7) == 7
    assert seen[0][0] is hidden
    assert seen[0][1] is table
    torch.testing.assert_close(projection(hidden, logits), hidden @ table.T)
