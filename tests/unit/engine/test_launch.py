"""What the start of training imports: torch's compiler alone costs as much as torch itself."""

import subprocess
import sys

import pytest

DEEPSPEED = """
import sys
from dstrain.engine.launch import import_deepspeed
deepspeed = import_deepspeed("cpu")
marks = deepspeed.runtime.compiler.compile
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
print("torch._inductor.compile_fx" in sys.modules, marks() is torch.compile)
"""
OPTIMIZERS = """
import sys
import torch
from dstrain.engine.config import AdamConfig
from dstrain.engine.optimizer import build_optimizer
for kind in ("adam", "adamw", "stable_adamw"):
    module = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(module, AdamConfig(kind=kind, learning_rate=1.0))
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
print("torch._dynamo" in sys.modules, module.weight.grad)
"""


@pytest.mark.parametrize(("script", "printed"), [(DEEPSPEED, "False True"), (OPTIMIZERS, "False None")])
def test_the_compiler_is_not_imported(script: str, printed: str) -> None:
    found = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert found.splitlines()[-1] == printed
