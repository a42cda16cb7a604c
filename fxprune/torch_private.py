"""Every name of PyTorch that is used here and is not public: one file, and one test that each is what it was.

A name that PyTorch moves or changes is mended here. Attributes of its objects (``Module._parameters``,
``_forward_hooks``, ...), operators by name (``aten._softmax``) and texts (``"torch._dynamo"``) are used in
their places.
"""

from __future__ import annotations

import torch
import torch._functorch.eager_transforms
import torch._functorch.vmap
from torch._C import DisableTorchFunction
from torch._ops import OpOverload, OpOverloadPacket
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.fx.node import _get_qualified_name as qualified_name
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.nn.modules.module import _global_forward_hooks as global_forward_hooks
from torch.nn.modules.module import _global_forward_hooks_always_called as global_hooks_always_called
from torch.nn.modules.module import _global_forward_hooks_with_kwargs as global_hooks_with_kwargs
from torch.nn.modules.module import _global_forward_pre_hooks as global_forward_pre_hooks
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors as device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNorm",
    "ConvNd",
    "ConvTransposeNd",
    "DisableTorchFunction",
    "DropoutNd",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "all_true",
    "any_true",
    "check_entry",
    "check_number",
    "device_constructors",
    "enter_autocast",
    "exit_autocast",
    "fused_adam_",
    "global_forward_hooks",
    "global_forward_pre_hooks",
    "global_hooks_always_called",
    "global_hooks_with_kwargs",
    "load_module_state",
    "nn_functions",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "pytree",
    "qualified_name",
    "set_grad_mode",
    "transform_levels",
    "transform_wrappers",
    "unique2",
]

set_grad_mode = torch._C._set_grad_enabled
"""Gradients on or off, without a context: ``torch.no_grad`` and its like call it."""
nn_functions = torch._C._nn
"""The functions of ``torch.nn.functional`` that are no code of Python."""
check_number = torch._assert
"""Raises ``AssertionError`` with a message unless a number is true; a node of graphs."""
check_entry = torch._assert_async
"""Raises ``RuntimeError`` with a message unless the one entry of a tensor is true; programs have it."""
unique2 = torch._unique2
"""Called by ``torch.unique`` where the caller wants counts or the inverse."""
fused_adam_ = torch._fused_adam_
"""One step of Adam on lists of tensors, in place."""
all_true, any_true = torch._is_all_true, torch._is_any_true
"""Whether all, or any, of the entries are true: what ``torch.distributions`` asks for."""
load_module_state = torch.nn.Module._load_from_state_dict
"""How a module reads its own entries of a state dict, if its class does not say otherwise."""
pack_padded_sequence = torch._VF._pack_padded_sequence
pad_packed_sequence = torch._VF._pad_packed_sequence
"""Parts of the functions of ``torch.nn.utils.rnn`` that are no code of Python."""
transform_levels = (
    (torch._functorch.vmap, "vmap_increment_nesting"),
    (torch._functorch.eager_transforms, "grad_increment_nesting"),
    (torch._functorch.eager_transforms, "jvp_increment_nesting"),
)
"""The contexts that open a level of a transform of ``torch.func``, by the modules that call them by name."""
transform_wrappers = (
    (torch._functorch.vmap, "_add_batch_dim"),
    (torch._functorch.eager_transforms, "_wrap_for_grad"),
)
"""The functions that wrap a tensor, their first argument, for a level."""
