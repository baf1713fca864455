"""Every kernel is compiled for an H100 or H200 (compute capability 9.0), which needs no GPU, and keeps its values in registers.
In compiled layers the kernels are part of the graph, forward and backward.

Compiling is for kernels that are not interpreted, so it is done by a process of its own: this file, run as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.paths import ROOT

REGISTERS = 255
"""Of a thread; more go to memory, which is slow."""


def outputs(program: str, directory: Path) -> list[Any]:
    """Each line that a program of this file prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiled_layers_have_the_kernels_in_their_graphs(tmp_path: Path) -> None:
    """The backward of each call is traced with it. The first graph rotates queries and keys; the second one has two norms."""
    before, after = outputs("trace", tmp_path)
    assert before == 4 * ["_rotary_kernel"]
    assert set(after) == {"_forward_kernel", "_backward_kernel", "_dropout_kernel", "_gate_kernel"}
    assert after.count("_forward_kernel") == after.count("_backward_kernel") == after.count("_gate_kernel") == 2


def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    usages = outputs("compile", tmp_path)
    assert {usage["kernel"] for usage in usages} == {
        "_backward_kernel",
        "_divergence_kernel",
        "_dropout_kernel",
        "_forward_kernel",
        "_gate_kernel",
        "_gradient_kernel",
        "_r_drop_kernel",
        "_rotary_kernel",
        "_statistics_kernel",
    }
    spilled = [usage for usage in usages if usage["LOCAL"] or usage["STACK"] or usage["REG"] > REGISTERS]
    assert not spilled


class Recorder:
    """Stands in for a kernel: compiles it for the arguments of a launch instead of running it."""

    def __init__(self, kernel: Any, directory: Path) -> None:
        self.kernel = kernel
        self.directory = directory

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        assert len(arguments) + len(constants) == len(names)
        signature = dict(zip(names, map(type_of, arguments), strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        binary = self.directory / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        print(json.dumps({"kernel": self.kernel.__name__, **constants, **resources(binary)}), flush=True)


def type_of(argument: Any) -> str:
    import torch

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
    return types[argument.dtype] if isinstance(argument, torch.Tensor) else {int: "i32", float: "fp32"}[type(argument)]


def resources(binary: Path) -> dict[str, int]:
    """Of a thread: REG, and the bytes of STACK and LOCAL, which are 0 without spills."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([program, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    words = next(line for line in done.stdout.splitlines() if "REG:" in line).split()
    usage = dict(word.split(":")[:2] for word in words if word.startswith(("REG:", "STACK:", "LOCAL:")))
    return {name: int(value) for name, value in usage.items()}


def launch_all() -> None:
    """At the sizes of large models: 4,096 features, a vocabulary of 64,000."""
    import torch

    from dstrain.ops.activation import ACTIVATIONS
    from dstrain.ops.divergence import Divergence
    from dstrain.ops.dropout import CountedMask
    from dstrain.ops.kernels import CROSS_ENTROPY, DROPOUT, GATE, NORM, R_DROP, ROTATION
    from dstrain.ops.norm import NormWeights
    from dstrain.ops.rotary import CosSin
    from dstrain.ops.token_loss.smoothing import LabelSmoothing
    from dstrain.ops.triton import divergence, softmax
    from dstrain.ops.vocabulary import VocabularySlice

    def kernel(op: Any) -> Any:
        return next(each.function for each in op.kernels if each.name == "triton")

    x = torch.ones(2, 4096, dtype=torch.bfloat16, requires_grad=True)
    keys = torch.ones(2, dtype=torch.int64)
    for centered, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        weight = torch.ones(4096, dtype=dtype, requires_grad=True)
        norm = NormWeights(weight, weight if centered else None, 1e-5, centered)
        sum(kernel(NORM)(x, norm, x, CountedMask(0.1, keys))).sum().backward()
    kernel(DROPOUT)(x, CountedMask(0.1, keys), x)
    for layout in ("half_split", "interleaved"):
        angles = torch.ones(3, 64, dtype=torch.bfloat16)
        kernel(ROTATION)(torch.ones(2, 32, 3, 128, dtype=torch.bfloat16), CosSin(angles, angles), layout)
    for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "linear"):
        kernel(GATE)(x, x, ACTIVATIONS[name]).sum().backward()
    logits, labels = torch.ones(2, 64_000), torch.ones(2, 1, dtype=torch.int64)
    vocabulary = VocabularySlice.whole(64_000)
    kernel(CROSS_ENTROPY)(logits, torch.ones(2, 1), labels, LabelSmoothing.of(0.1, 64_000), vocabulary, weights=None)
    kernel(R_DROP)(torch.ones(2, 2, 64_000), labels, 1.0, vocabulary.reductions(), None)
    pending = softmax.softmax_statistics(logits, None, vocabulary.reductions(), temperature=2.0, with_plain=True)
    softmax.softmax_gradient_(logits, pending.result(), weight=torch.ones(2, 1), plain_weight=1.0, temperature=2.0)
    tempered = divergence.Tempered(logits, 2.0, pending.result())
    for kind in divergence.CODES:
        divergence.divergence_gradient_(
            Divergence(kind, 0.3), tempered, tempered, vocabulary.reductions(), weight=torch.ones(2, 1), plain_weight=1.0
        )


def trace_layer() -> None:
    """Print the kernels of each graph of a layer that asks for them. The graphs are made, not run: there is no GPU."""
    import torch
    from torch.utils import _triton

    _triton.has_triton = lambda: True  # as it is with a GPU: dynamo takes kernels for what they are
    warnings.filterwarnings("error", message="Dynamo detected")  # what it traces otherwise than it is written
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from dstrain.models.config import DecoderStackConfig, LayerNormConfig, StackConfig
    from dstrain.models.position_config import RotaryPosition
    from dstrain.nn.attention_bias import AttentionContext
    from dstrain.nn.compiling import compile_layers
    from dstrain.nn.dropout import MaskKeys
    from dstrain.nn.rotary import Rotation
    from dstrain.ops.kernels import OPS
    from dstrain.ops.rotary import CosSin
    from tests.unit.models.build import small_config, small_model

    def make(graph: Any, inputs: Any) -> Any:
        nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
        kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes if "kernel_idx" in node.kwargs]
        print(json.dumps([getattr(kernel, "fn", kernel).__name__ for kernel in kernels]), flush=True)
        (outs,) = next(node.args for node in nodes if node.op == "output" and node.graph is graph.graph)
        return lambda *_: tuple(torch.zeros([int(size) for size in out.meta["example_value"].shape]) for out in outs)

    sizes = {"depth": 1, "num_heads": 2, "ffn_dim": 6, "feed_forward": "gated"}
    config = small_config(
        model_dim=8,
        encoder=StackConfig(**sizes),
        decoder=DecoderStackConfig(**sizes),
        norm_order="post",
        norm=LayerNormConfig(),
        position=RotaryPosition(),
        activation="silu",
        dropout=0.1,
        activation_dropout=0.1,
    )
    model: Any = small_model(config).train()
    compile_layers(model, "layers", backend=make)
    layer, x = model.encoder.layers[0], torch.ones(16, 8, requires_grad=True)
    for part in (layer.before_attention, layer.after_attention):
        part._has_run = True  # what a first run, which needs a GPU, would leave: the functions of the table
    with ExitStack() as stack, MaskKeys(torch.arange(16), 1).at(0):
        for name in ("norm", "dropout", "rotary", "gate"):
            stack.enter_context(OPS[name].forced("triton"))
            assert OPS[name].choose(x.device, x.dtype)._function
        context = AttentionContext(rotation=Rotation(CosSin(*torch.ones(2, 1, 16, 2)), "half_split"))
        query, _, _ = layer.before_attention(x, context)
        layer.after_attention(x, query)


def record_all(directory: Path) -> None:
    """A recorder in the place of every kernel."""
    import triton

    from dstrain.ops.triton import divergence, dropout, gate, norm, r_drop, rotary, softmax

    for module in (divergence, dropout, gate, norm, r_drop, rotary, softmax):
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Recorder(value, directory))


if __name__ == "__main__":
    if sys.argv[1] == "trace":
        trace_layer()
    else:
        record_all(Path(os.environ["TRITON_CACHE_DIR"]))
        launch_all()
