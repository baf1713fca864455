"""When training packs sequences, and to how many tokens."""

from typing import Any

import pytest
import torch

from dstrain.build.training_data import packed_size
from dstrain.data.batching.collate import PackedSize
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, StackConfig, sequence_problems
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh
from dstrain.recipe_file import load_recipe


def mesh(device: str, *, tensor: int = 1, sequence: int = 1) -> Mesh:
    def group(size: int) -> Group:
        return Group(0, size, None, torch.device(device))

    world = tensor * sequence
    return Mesh(group(world), data=group(1), sequence=group(sequence), tensor=group(tensor), replicas=group(world), local_rank=0)


@pytest.mark.parametrize(
    ("layout", "where", "expected"),
    [
        ("auto", {"device": "cpu"}, None),
        ("auto", {"device": "cpu", "tensor": 2}, None),
        ("auto", {"device": "cpu", "sequence": 2}, PackedSize(2)),
        ("auto", {"device": "cuda"}, PackedSize(64)),
        ("auto", {"device": "cuda", "tensor": 2, "sequence": 4}, PackedSize(512)),
        ("packed", {"device": "cpu"}, PackedSize(1)),
        ("padded", {"device": "cuda"}, None),
    ],
)
def test_auto_packs_on_a_gpu_and_with_sequence_ranks(layout: str, where: Any, expected: PackedSize | None) -> None:
    sequence = where.get("sequence", 1)
    recipe = load_recipe("translation/multi30k_tiny", [f"engine.layout={layout}", f"engine.parallel.sequence={sequence}"])
    assert packed_size(recipe, mesh(**where)) == expected


def test_auto_packs_for_compiled_layers() -> None:
    recipe = load_recipe("translation/multi30k_tiny", ["engine.compile=layers"])
    assert packed_size(recipe, mesh("cpu")) == PackedSize(1)


def test_the_heads_of_a_teacher_must_suit_the_sequence_ranks() -> None:
    stack = {"depth": 1, "ffn_dim": 8, "num_heads": 6}
    config = EncoderDecoderConfig(
        model_dim=24, encoder=StackConfig(**stack), decoder=DecoderStackConfig(**{**stack, "num_heads": 4})
    )
    assert list(sequence_problems(config, tensor=1, sequence=2, owner="teacher: ")) == []
    (problem,) = sequence_problems(config, tensor=1, sequence=4, owner="teacher: ")
    assert problem == (
        "engine.parallel.sequence = 4 does not suit teacher: encoder.num_heads = 6: the ranks share heads; choose a divisor of "
        "the heads"
    )
