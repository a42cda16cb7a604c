"""Problems over the nets of the suite."""

from typing import Any

import torch
from nets import NETS
from torch import nn

from methods import problems


def asked(net: str, sparsity: float, **fields: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    return model, inputs, problems.asked(model, inputs, sparsity, **fields)
