"""Which settings need a compiler when they run."""

import pytest

from dstrain.build.training import _compiled
from dstrain.recipe_file import load_recipe

FLEX = {"kernels.packed_alibi_attention = flex": "kernels.packed_alibi_attention: padded_rows"}
ALIBI = "model.position={kind: alibi}"


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        ([], {}),
        (["engine.compile=layers"], {"compile = layers": "compile: none"}),
        (["engine.kernels.norm=triton"], {"kernels.norm = triton": "kernels.norm: torch"}),
        (["engine.kernels.cross_entropy=liger"], {"kernels.cross_entropy = liger": "kernels.cross_entropy: torch"}),
        ([ALIBI], FLEX),
        ([ALIBI, "engine.layout=padded"], {}),
        ([ALIBI, "model.attention_dropout=0.1"], {}),
        ([ALIBI, "engine.kernels.packed_alibi_attention=padded_rows"], {}),
    ],
)
def test_of_a_gpu(overrides: list[str], compiled: dict[str, str]) -> None:
    assert _compiled(load_recipe("translation/multi30k_tiny", overrides), "cuda") == compiled


def test_of_a_cpu() -> None:
    recipe = load_recipe("translation/multi30k_tiny", [ALIBI, "engine.kernels.norm=triton", "engine.compile=layers"])
    assert _compiled(recipe, "cpu") == {"compile = layers": "compile: none"}
