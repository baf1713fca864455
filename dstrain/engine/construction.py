"""Give the parameters of a module their values, one at a time, whole or partitioned over the ranks (ZeRO-3).

A module may come with parameters on the meta device, to be read from a `WeightSource`, and with others that have values. Under
ZeRO-3 a parameter is read, handed to DeepSpeed, which keeps this rank's share, and freed before the next one is read: a rank
holds its share and one parameter. DeepSpeed's own `zero.Init` around the constructor is not used: it would partition parameters
before they have values, and ties and adapters after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.config_base import Precision
from dstrain.engine.ds_config import ModelSize
from dstrain.models.weights import check_canonical, materialize_parameter, parameter_layouts
from dstrain.parallel.mesh import ModelParallelUnit
from dstrain.protocols import WeightSource

COMPUTE_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ParameterValues:
    """The exact value of every parameter of `module`, readable as often as needed, whatever the parameter has become.

    model: the submodule whose parameters `source` knows by canonical name. source: None if no parameter is on the meta device.
    Raises BundleError if the source does not fit the model. Create it before DeepSpeed sees the module.
    """

    def __init__(self, module: nn.Module, model: nn.Module, source: WeightSource | None) -> None:
        self._source = source
        self._layouts = {}
        if source is not None:
            layouts = parameter_layouts(model)
            check_canonical(layouts, source)
            self._layouts = {parameter: layouts[name] for name, parameter in model.named_parameters() if parameter.is_meta}
        self._present = {parameter: parameter.data for parameter in module.parameters() if not parameter.is_meta}

    def read(self, parameter: nn.Parameter, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole value on `device`; in new memory, unless it has been there in this dtype from the start."""
        if parameter in self._present:
            return self._present[parameter].to(device, dtype)
        if self._source is None:
            raise ValueError("a parameter is on the meta device, but there is no WeightSource to read it from")
        return self._layouts[parameter].read(self._source, device=device, dtype=dtype)


def size_of(module: nn.Module) -> ModelSize:
    """Numbers of its parameters, before they are partitioned. A module without gradients has no use for limits of them."""
    layers = [sum(parameter.numel() for parameter in layer.parameters(recurse=False)) for layer in module.modules()]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return ModelSize(sum(parameter.numel() for parameter in module.parameters()), max(layers), trained or None)


def fill(module: nn.Module, values: ParameterValues, *, device: torch.device, dtype: torch.dtype) -> None:
    """Make every parameter whole, on `device` in `dtype`."""
    for parameter in module.parameters():
        _set(parameter, values.read(parameter, device=device, dtype=dtype))
    module.to(device)  # buffers


def partition(
    deepspeed: ModuleType,
    module: nn.Module,
    values: ParameterValues,
    config: dict[str, Any],
    *,
    mpu: ModelParallelUnit | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make every parameter this rank's ZeRO-3 share of its value in `dtype`. Collective.

    config: DeepSpeed's, with stage 3. mpu: as `deepspeed.initialize` gets it; None partitions over all ranks.
    """
    group = None if mpu is None else mpu.get_data_parallel_group()
    first: Any = None
    for parameter in module.parameters():
        _set(parameter, values.read(parameter, device=device, dtype=dtype))
        if first is None:
            first = cast("Any", parameter)
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, data_parallel_group=group, mpu=mpu, config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters([parameter])


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.is_meta:
        materialize_parameter(parameter, value)
    else:
        parameter.data = value


def take_fp32_gradients(optimizer: Any, module: nn.Module) -> None:
    """Let autograd give gradients in float32 if DeepSpeed adds them up in it, as ZeRO-1 does in bf16 training.

    The other stages copy each gradient into a buffer of the parameters' dtype first.
    """
    if getattr(optimizer, "use_grad_accum_attribute", False):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float32
