"""Slices of parameters, in one process."""

import pytest
import torch

from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model, initial_values
from dstrain.models.weights import canonical_shapes, load_canonical, parameter_layouts
from dstrain.parallel.group import Group
from dstrain.parallel.tensor import vocabulary_shard

CPU = torch.device("cpu")


def rank_of(rank: int, size: int) -> Group:
    """A rank of a group that is not there: for what does not communicate."""
    return Group(rank, size, None, CPU)


@pytest.mark.parametrize(("vocab_size", "ranks"), [(37, 2), (37, 4), (8, 4), (5, 4), (123, 7)])
def test_the_slices_of_a_vocabulary_are_disjoint_and_complete(vocab_size: int, ranks: int) -> None:
    shards = [vocabulary_shard(vocab_size, rank_of(rank, ranks)) for rank in range(ranks)]
    assert [entry for shard in shards for entry in range(shard.start, shard.stop)] == list(range(vocab_size))
    assert max(shard.stop - shard.start for shard in shards) == -(-vocab_size // ranks)


@pytest.mark.parametrize("projections", ["fused", "separate"])
def test_the_ranks_hold_each_value_of_the_whole_model(projections: str) -> None:
    stack = {"depth": 1, "num_heads": 4, "ffn_dim": 20}
    config = EncoderDecoderConfig(
        model_dim=16,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack, num_kv_heads=2),
        embedding=PlainEmbedding(tie="all"),
    )
    sizes = VocabularySizes(source=37, target=37)
    whole = build_model(config, sizes, seed=1)
    values = initial_values(whole, sizes, 1)
    ranks = [build_model(config, sizes, seed=None, projections=projections, tensor=rank_of(rank, 2)) for rank in range(2)]
    counts = dict.fromkeys(values.names(), 0)
    for model in ranks:
        layouts = parameter_layouts(model)
        assert canonical_shapes(layouts) == {name: values.shape(name) for name in values.names()}
        load_canonical(model, values)
        for name, parameter in model.named_parameters():
            for part in layouts[name].slices:
                own = parameter if part.rows is None else parameter[part.rows]
                expected = values.read(part.name)
                if part.shard is not None:
                    expected = expected.narrow(part.shard.dim, part.shard.start, part.shard.stop - part.shard.start)
                    counts[part.name] += expected.numel()
                assert torch.equal(own, expected), part.name
    cut = {name for name, count in counts.items() if count}
    assert all(counts[name] == values.read(name).numel() for name in cut)
    whole_names = {name for name in counts if "norm" in name or name.endswith(("out_proj.bias", "down_proj.bias"))}
    assert counts.keys() - cut == whole_names
