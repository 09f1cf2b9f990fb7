"""A GPU's stand-in, for machines without one: CPU tensors that pass for a device's and refuse to be mixed.

What a GPU computes it cannot tell. But every branch that asks for a tensor's device takes the GPU's way,
with the numbers of a CPU, and what a GPU would refuse is refused: operations on tensors of two devices,
numpy arrays of its memory, and on MPS float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
MOVES = (Tensor.to, Tensor.cpu, Tensor.copy_, Tensor.__setitem__, Tensor.data.__set__)  # between devices

QUESTIONS = (torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)  # of nn.Module.to


def names_device(argument: Any) -> bool:
    """Whether an argument of a call is a device, or the name of one."""
    return isinstance(argument, torch.device) or (
        isinstance(argument, str) and argument in ("cpu", "cuda", "mps")
    )


class StandIn(TorchFunctionMode):
    """While active, there is a device of this type: tensors go there by `to(device)` and `device=`."""

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self._there: dict[int, Any] = {}  # storages by address, kept so that no address is given out again

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        return tensor.untyped_storage()._cdata in self._there

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in QUESTIONS:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if self.holds(tensor)]
        if func == Tensor.device.__get__:
            return self.device if there else func(*args)
        if func == Tensor.numpy and there:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        mixed = there and any(tensor.ndim and not self.holds(tensor) for tensor in tensors)
        if mixed and func not in MOVES and func is not Tensor.__getitem__:
            raise RuntimeError(f"{func.__name__}: Expected all tensors to be on the same device")
        target = self._target(func, args, kwargs)
        if target is not None:
            args = tuple(CPU if names_device(arg) else arg for arg in args)
            kwargs |= {"device": CPU} if "device" in kwargs else {}
            kwargs |= {"copy": True} if func is Tensor.to else {}
        result = args[0].clone() if func is Tensor.cpu else func(*args, **kwargs)
        if target == self.device or (target is None and there):
            tree_map(self._take, result)
        return result

    def _target(self, func: Callable, args: Any, kwargs: Any) -> torch.device | None:
        """The device that a call names, if it does."""
        if func is Tensor.cpu:
            return CPU
        named = [torch.device(arg) for arg in (*args, kwargs.get("device")) if names_device(arg)]
        return named[0] if named else None

    def _take(self, leaf: Any) -> None:
        if not isinstance(leaf, Tensor):
            return
        if self.device.type == "mps" and leaf.dtype == torch.float64:
            raise TypeError("MPS does not have float64")
        storage = leaf.untyped_storage()
        self._there[storage._cdata] = storage
