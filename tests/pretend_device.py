"""A pretended accelerator on a CPU: its tensors hold real values, say that they live elsewhere, refuse to meet tensors
of the CPU, and count how often the host waits for them.

It is torch's device type `lazy`, for which torch's wheels have no kernels, so that whatever this file does not handle
fails instead of running on the CPU; and a backward pass on it runs on the calling thread, like one on a CPU. Code that
asks for `cuda` by name takes its other branch here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SHAPE_FROM_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class PretendedEvent:
    """`torch.cuda.Event` of the device: what was copied to the host before it was recorded is there once it has been
    waited for. Until then the host's tensor holds the opposite of what it will."""

    waiting: ClassVar[list[tuple[Tensor, Tensor]]] = []  # tensors of the host and what they will hold

    def record(self) -> None:
        self._copies, PretendedEvent.waiting = PretendedEvent.waiting, []

    def synchronize(self) -> None:
        while self._copies:
            target, value = self._copies.pop(0)
            target.copy_(value)


class Pretended(Tensor):
    """A tensor on DEVICE: a wrapper around a CPU tensor, `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        """Refuses a tensor of the CPU: torch would move a parameter there without a word."""
        if not isinstance(other, Pretended):
            raise RuntimeError("a parameter on the device was given the data of a tensor on the CPU")
        Tensor.data.__set__(self, other)
        self.inner = other.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        raise RuntimeError(f"{func} on the pretended device, which is not open")


class PretendedDevice(TorchDispatchMode):
    """While it is open, tensors can be made on DEVICE and used. `waits` names what made the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._before: list[bool] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its import takes seconds

    def __enter__(self) -> PretendedDevice:
        self._before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor` moves its values out of sight of this mode
        if "torch.lazy" not in sys.modules:  # what torch.utils.checkpoint looks for, and finds nothing in
            module = ModuleType("torch.lazy")
            module.Event = PretendedEvent
            torch._register_device_module("lazy", module)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before.pop())
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.overloadpacket is aten.to:  # whole in inference mode only
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if not torch.is_inference_mode_enabled():
            return self._run(func, args, dict(kwargs or {}))
        with torch.inference_mode(False), torch.no_grad():  # a view of an ordinary tensor must be an ordinary tensor
            return self._run(func, args, dict(kwargs or {}))

    def _run(self, func, args, kwargs: dict[str, Any]) -> Any:
        if func is aten._to_copy.default:
            return self._moved(args[0], kwargs)
        if func is aten.copy_.default:
            return self._copied(*args, **kwargs)
        met: list[Tensor] = []
        inner_args, inner_kwargs = unwrapped(args, met), {name: unwrapped(part, met) for name, part in kwargs.items()}
        here = {id(tensor.inner): tensor for tensor in met if isinstance(tensor, Pretended)}
        is_here, device = bool(here), kwargs.get("device")
        if device is not None and torch.device(device).type != "meta":
            is_here, inner_kwargs["device"] = is_pretended(device), CPU
        if here or is_here:
            refuse_mixture(func, met, kwargs)
            self._note_wait(func, args)
        made = func(*inner_args, **inner_kwargs)
        return wrapped(made, here) if is_here else made

    def _moved(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        target = kwargs.pop("device", None) or tensor.device
        self._note_copy(tensor, to_here=is_pretended(target), non_blocking=kwargs.get("non_blocking", False))
        made = aten._to_copy.default(unwrapped(tensor, []), **kwargs, device=CPU if is_pretended(target) else target)
        return Pretended(made) if is_pretended(target) else made

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking and isinstance(source, Pretended) and not isinstance(target, Pretended):
            return self._copied_late(target, source.inner.clone())
        self._note_copy(source, to_here=isinstance(target, Pretended), non_blocking=non_blocking)
        unwrapped(target, []).copy_(unwrapped(source, []))
        return target

    def _copied_late(self, target: Tensor, value: Tensor) -> Tensor:
        """To the host, when an event that is recorded after it is waited for."""
        if target.dtype != torch.bool:
            raise RuntimeError("only bools can be copied late: nothing else has an opposite to stand there meanwhile")
        PretendedEvent.waiting.append((target, value))
        return target.copy_(~value)

    def _note_copy(self, source: Tensor, *, to_here: bool, non_blocking: bool) -> None:
        """Copies between host and device are waited for unless they are `non_blocking`."""
        from_here = isinstance(source, Pretended)
        if to_here == from_here or source.numel() == 0:
            return
        if not non_blocking:
            self.waits.append("upload" if to_here else "read")
        elif from_here:
            raise RuntimeError("a tensor of the device was copied to the CPU without waiting for its values")

    def _note_wait(self, func, args) -> None:
        by_mask = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func is aten._local_scalar_dense.default:
            self.waits.append("read")
        elif by_mask or func in SHAPE_FROM_VALUES:
            self.waits.append("shape")


def refuse_mixture(func, tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    """A tensor of the CPU may meet the device as a single number in an element-wise operation, and in no other way.
    (torch also lets it be an index there, and moves it.)"""
    may_be_number = torch.Tag.pointwise in func.tags or func in INDEXING
    for tensor in tensors:
        if not isinstance(tensor, Pretended) and not (may_be_number and tensor.dim() == 0):
            raise RuntimeError(f"two devices in {func}: a tensor of shape {tuple(tensor.shape)} is on the CPU")
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"two devices in {func}: the generator is on the CPU")


def is_pretended(device: torch.device | str) -> bool:
    return torch.device(device).type == DEVICE.type


def unwrapped(tree: Any, met: list[Tensor]) -> Any:
    """`tree` with the tensors inside of those on the device; `met` gets every tensor in it."""
    if isinstance(tree, Tensor):
        met.append(tree)
        return tree.inner if isinstance(tree, Pretended) else tree
    return type(tree)([unwrapped(part, met) for part in tree]) if isinstance(tree, (tuple, list)) else tree


def wrapped(made: Any, given: dict[int, Pretended]) -> Any:
    """Results on the device. One that was written in place, or to `out=`, is the tensor that was given."""
    if isinstance(made, Tensor):
        return given[id(made)] if id(made) in given else Pretended(made)
    return type(made)([wrapped(part, given) for part in made]) if isinstance(made, (tuple, list)) else made
