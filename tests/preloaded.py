"""What the server of `tests/processes.py` imports once for all of its forks: what most trainings import sooner or later."""

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # with torch._dynamo, at the first engine
import pandas  # at pyarrow's first table
import sacrebleu

import dstrain.cli.generate
import dstrain.cli.train
import tests.parallel.scenarios

__all__ = ["deepspeed", "dstrain", "pandas", "sacrebleu", "tests"]
