"""What the server of `tests/processes.py` imports once for all of its forks: what most trainings import sooner or later."""

import deepspeed.ops
import pandas  # at pyarrow's first array of a list
import sacrebleu
import torch._dynamo  # at the first step of ZeRO-3

import dstrain.cli.generate
import dstrain.cli.train
import tests.parallel.scenarios

__all__ = ["deepspeed", "dstrain", "pandas", "sacrebleu", "tests", "torch"]
