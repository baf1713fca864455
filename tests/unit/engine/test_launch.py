"""What the start of training imports."""

import subprocess
import sys

SCRIPT = """
import sys
from dstrain.engine.launch import import_deepspeed
deepspeed = import_deepspeed("cpu")
marks = deepspeed.runtime.compiler.compile
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
print("torch._inductor.compile_fx" in sys.modules, marks() is torch.compile)
"""


def test_deepspeed_is_imported_without_inductor() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert found.splitlines()[-1] == "False True"
