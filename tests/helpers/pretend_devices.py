"""Pretend GPUs on a machine without any: tensors carry a device, and operations that mix two raise what torch raises.

How it works: numbers stay in the CPU's memory. A ``TorchFunctionMode`` answers what Python code asks of devices
(``tensor.device``, ``tensor.to("cuda:1")``, ``torch.arange(..., device=...)``), and a ``TorchDispatchMode`` sees every
operation that runs, in forward and backward passes, inside transformers too. The device belongs to the *storage* of a
tensor, so that views, parameters and what autograd has saved share it as they do in torch. ``FakeTensorMode`` with
``cuda:0`` and ``cuda:1`` would not do: it has no numbers, which generation, captures and relevancy ask for.

The rules are torch's own:

- all tensors of an operation are on one device; a zero-dimensional CPU tensor goes with any;
- indices of ``x[i]`` may be on the CPU, else they are on the device of ``x``;
- ``copy_`` and ``to`` move; the gradient of a move moves back;
- numpy reads tensors of the CPU alone; a generator is of the device that it fills.

``split`` spreads a model as ``from_pretrained(..., device_map=...)`` does: weights go to the device of their longest
prefix in the map, and ``accelerate.dispatch_model`` itself adds the hooks. These move the arguments of every hooked
module to its device (``AlignDevicesHook.pre_forward``), leave its output there, and move the output of the whole model
to where its inputs came from (``io_same_device``). So inputs and logits are on the first device, while hidden states,
norm and head of a model that is cut are on the other: an index that is built "on the input's device" and used inside
the model, or beside what a later layer has left, is refused here as on a machine with two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
FREE = 2**34  # bytes on each
_aten = torch.ops.aten
_INDEXING = {
    op.overloadpacket
    for op in (
        _aten.index.Tensor,
        _aten.index_put.default,
        _aten.index_put_.default,
        _aten._index_put_impl_.default,
        _aten._unsafe_index.Tensor,
        _aten._unsafe_index_put.default,
    )
}
_ANY = torch.device("meta")  # of what autograd makes for itself: it would be where it is used
_COPIES = {_aten.copy_, _aten.copy}
_LIKE = ("cpu", "cuda", "to", "type_as")  # methods that move


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, devices: Devices, device: torch.device) -> Tensor:
        with devices.creating(device):
            return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        tensor, ctx.devices, _ = inputs
        ctx.source = ctx.devices.of(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with ctx.devices.creating(ctx.source):
            return gradient.clone(), None, None


class Devices:
    """Which storage is on which device; CPU where nothing was said."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._purge_at = 10_000
        self.asked: torch.device | None = None
        self.in_python = False  # within a call that Python code has made, not one of autograd's own
        self.operations = 0

    def of(self, tensor: Tensor) -> torch.device:
        """The device of a tensor."""
        if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor = torch._C._functorch.get_unwrapped(tensor)
            if tensor.is_meta:
                return torch.device("meta")
        entry = self._known.get(tensor.untyped_storage()._cdata)
        return CPU if entry is None else entry[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        """Says where a tensor is. The weak reference keeps its address from being used again."""
        storage = tensor.untyped_storage()
        if device == CPU:
            self._known.pop(storage._cdata, None)
            return
        self._known[storage._cdata] = StorageWeakRef(storage), device
        if len(self._known) > self._purge_at:
            self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
            self._purge_at = max(10_000, 2 * len(self._known))

    @contextmanager
    def creating(self, device: torch.device) -> Iterator[None]:
        """What operations return in the block is on this device, wherever their inputs are."""
        before, self.asked = self.asked, device
        try:
            yield
        finally:
            self.asked = before

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor if it is there, else a copy."""
        if device == self.of(tensor) or tensor.is_meta:
            return tensor
        return _Move.apply(tensor, self, device)


class _Operations(TorchDispatchMode):
    """Refuses every operation that mixes devices."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        devices, kwargs = self._devices, kwargs or {}
        devices.operations += 1
        values = tree_flatten((args, kwargs))[0]
        of_autograd = not devices.in_python and torch._C._current_graph_task_id() != -1
        if devices.asked is None and of_autograd and not any(isinstance(value, Tensor) for value in values):
            device = _ANY
        else:
            device = devices.asked or self._of(func, args, values)
        returned = func(*args, **kwargs)
        if device != CPU or devices.asked is not None:
            for value in tree_flatten(returned)[0]:
                if isinstance(value, Tensor) and not value.is_meta:
                    devices.put(value, device)
        return returned

    def _of(self, func: Any, args: tuple, values: list[Any]) -> torch.device:
        """Where an operation runs."""
        packet = func.overloadpacket
        if packet in _COPIES:
            return self._devices.of(args[0])
        if packet in _INDEXING:
            own = self._devices.of(args[0])
            for index in args[1]:
                if index is not None and self._devices.of(index) not in (CPU, own):
                    raise RuntimeError(
                        f"indices should be either on cpu or on the same device as the indexed tensor ({own}), "
                        f"got {self._devices.of(index)} in {func}"
                    )
            return self._same(func, [args[0], *args[2:3]])
        return self._same(func, values)

    def _same(self, func: Any, values: list[Any]) -> torch.device:
        tensors = [value for value in values if isinstance(value, Tensor)]
        there = [(self._devices.of(tensor), tensor.dim()) for tensor in tensors]
        there = [(device, size) for device, size in there if device.type != "meta"]
        devices = {device for device, size in there if size or device != CPU} or {CPU}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {names}! ({func})")
        return devices.pop()


class _Questions(TorchFunctionMode):
    """Answers what Python code asks of devices."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device and isinstance(args[0], int):
            return _device(args[0])
        name = getattr(func, "__name__", "")
        if name == "__get__" and args and isinstance(args[0], Tensor):
            getter = getattr(func.__self__, "__name__", "")
            if getter == "device":
                return self._devices.of(args[0])
            if getter == "is_cuda":
                return self._devices.of(args[0]).type == "cuda"
        if name in _LIKE and args and isinstance(args[0], Tensor):
            return self._moved(name, *args, **kwargs)
        if name in ("numpy", "__array__") and self._devices.of(args[0]) != CPU:
            raise TypeError(
                f"can't convert {self._devices.of(args[0])} device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if name == "get_device":
            device = self._devices.of(args[0])
            return -1 if device == CPU else device.index
        return self._made(func, args, kwargs)

    def _made(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls the function; what it makes on a device that is named is there."""
        device = _device(kwargs.get("device"))
        if device is None or device.type == "meta":
            if func in (torch.tensor, torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
                device = self._devices.of(args[0])  # of a tensor, and nothing was said
            else:
                return self._called(func, args, kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            kinds = device.type, generator.device.type
            raise RuntimeError("Expected a '{}' device type for generator but found '{}'".format(*kinds))
        if func is torch.as_tensor and isinstance(args[0], Tensor):
            return self._moved("to", args[0], device, *([kwargs["dtype"]] if kwargs.get("dtype") else []))
        with self._devices.creating(device):
            return func(*args, **{**kwargs, "device": CPU})

    def _called(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        before, self._devices.in_python = self._devices.in_python, True
        try:
            return func(*args, **kwargs)
        finally:
            self._devices.in_python = before

    def _moved(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, rest = (CPU if name == "cpu" else FIRST if name == "cuda" else None), []
        for value in args:
            if isinstance(value, Tensor):
                device = self._devices.of(value)
                rest.append(value.dtype)
            elif (named := _device(value)) is not None:
                device = named
            elif not isinstance(value, bool):
                rest.append(value)
        device = _device(kwargs.pop("device", None)) or device
        if "other" in kwargs:
            other = kwargs.pop("other")
            device, kwargs["dtype"] = self._devices.of(other), other.dtype
        kwargs.pop("non_blocking", None)
        if device is not None and device.type == "meta":
            return tensor.to(device, *rest, **kwargs)
        if rest or kwargs:
            tensor = tensor.to(*rest, **kwargs)
        return tensor if device is None else self._devices.move(tensor, device)


def _device(value: Any) -> torch.device | None:
    """A device by any of its names; a number is a GPU, as on a machine that has some."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return torch.device("cuda", value)
    if isinstance(value, (str, torch.device)):
        device = torch.device(value)
        return FIRST if device.type == "cuda" and device.index is None else device
    return None


@contextmanager
def pretend_devices() -> Iterator[Devices]:
    """For the length of a block there are two GPUs, of which every operation in this thread knows."""
    devices = Devices()
    # torch.autograd.grad would be called with the function mode off, and so would hooks and layers that run again in it
    with (
        mock.patch.object(torch.autograd, "has_torch_function", return_value=False),
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(FREE, FREE)),
        _Questions(devices),
        _Operations(devices),
    ):
        yield devices


@contextmanager
def one_device() -> Iterator[None]:
    """Within ``pretend_devices``: for the length of a block torch is as it is, for what is to be compared."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def split(model: nn.Module, device_map: Mapping[str, Any]) -> nn.Module:
    """Spreads a model in memory over pretend devices as ``from_pretrained`` does with weights from files."""
    from accelerate import dispatch_model

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        device = place_of(device_map, name)
        if device not in ("cpu", "disk"):
            owner, _, last = name.rpartition(".")
            holder = model.get_submodule(owner)
            moved = tensor.data.to(device)
            if last in holder._parameters:
                holder._parameters[last].data = moved
            else:
                holder._buffers[last] = moved
    return dispatch_model(model, device_map=dict(device_map), skip_keys=model._skip_keys_device_placement)


def place_of(device_map: Mapping[str, Any], name: str, key: bool = False) -> Any:
    """The device of a parameter or module: that of its longest prefix in the map. With ``key`` this prefix."""
    keys = (prefix for prefix in device_map if not prefix or name == prefix or name.startswith(f"{prefix}."))
    longest = max(keys, key=len, default=None)
    return longest if key else device_map.get(longest)
