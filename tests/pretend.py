"""Pretend accelerators: devices `pretend:0`, `pretend:1`, ... of a machine that has none.

    with pretend.devices():
        model = load_model("organism", device="pretend:0")
        with pretend.counting() as found:
            ...
        found.copies, found.waits  # place in the code -> how often

A tensor on one is a wrapper around a CPU tensor (`host`) under another device's name. Its operations run on the host tensor, so
that results are the CPU's to the last bit, and they refuse what CUDA refuses: tensors of two devices, `.numpy()`. Two layers
do it. A function mode sees calls from Python, among them all that name a device; the wrapper's dispatch sees every operation on
a wrapper, those of backward passes included. Time, memory, streams and the rounding of a real device's kernels do not show.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lofit_lens.models import devices as places

KIND = "pretend"
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Elsewhere a CPU tensor without dimensions is taken for a number.
NO_NUMBERS = {
    aten.cat.default,
    aten.stack.default,
    aten.gather.default,
    aten.index_select.default,
    aten.embedding.default,
}
# The host needs values of the device before it can go on: a number, or how large the result is.
WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


@dataclass
class Counted:
    """What a block does beside computing on its device: for each place in the code, how often.

    `copies` are tensors that went from one device to another (the CPU is one), `waits` are times at which Python needed a
    value of a device: `.item()`, `.tolist()`, `if x`, a mask as an index, a copy to the CPU.
    """

    copies: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


_counting: list[Counted] = []


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Count for the length of the block."""
    found = Counted()
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.remove(found)


def _count(what: str) -> None:
    """One more, at the innermost line that belongs neither to torch nor to this file."""
    if not _counting:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in ("/torch/", __file__)):
        frame = frame.f_back
    file = frame.f_code.co_filename.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
    place = f"{file}:{frame.f_lineno}"
    for found in _counting:
        getattr(found, what)[place] += 1


# ---------------------------------------------------------------------------------------------------------- tensors


class OnDevice(Tensor):
    """A tensor of a pretend device. Torch's own record of it says CPU, which only C++ sees."""

    host: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # the results' class is settled below

    @staticmethod
    def __new__(cls, host: Tensor, place: torch.device) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        made.host, made.place = host, place
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors: list[Tensor] = []
        kwargs = kwargs or {}
        hosts, named_hosts = _hosts(args, tensors), {name: _hosts(x, tensors) for name, x in kwargs.items()}
        place = _checked(func, tensors)
        if func in WAITING or (func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])):
            _count("waits")
        found = func(*hosts, **named_hosts)
        if torch.Tag.inplace_view in func.tags:  # the wrapper's own shape changes with the host's
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        return _wrapped(found, place, {id(_host(t)): t for t in tensors})

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.place.index

    def tolist(self) -> Any:
        _count("waits")
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = OnDevice(self.host.clone(), self.place).requires_grad_(self.requires_grad)
        memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"{self.host!r} on {self.place}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _hosts(x: Any, tensors: list[Tensor]) -> Any:
    """An operation's argument with hosts in place of wrappers; its tensors are put into the list, as they are."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _host(x)
    return [_hosts(y, tensors) for y in x] if type(x) in (list, tuple) else x


def _wrapped(x: Any, place: torch.device, given: dict[int, Tensor]) -> Any:
    """A result on its device; what was given and changed in place is the same object again."""
    if isinstance(x, Tensor):
        if id(x) in given:
            return given[id(x)]
        return OnDevice(x, place) if place.type == KIND else x
    return type(x)([_wrapped(y, place, given) for y in x]) if type(x) in (list, tuple) else x


def _checked(func: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation's results.

    Raises:
        RuntimeError: tensors that CUDA does not let meet.
    """
    if func is aten.copy_.default:
        if tensors[0].device != tensors[1].device:
            _count("copies")
        return tensors[0].device
    place = next(t.place for t in tensors if isinstance(t, OnDevice))
    if func in INDEXING:
        # An index may lie on the CPU, and one value to put in, too.
        place, tensors = tensors[0].device, [t for t in tensors[1:] if t.device.type == KIND or t is tensors[-1]]
        if func is aten.index.Tensor:
            tensors = [t for t in tensors if t.device.type == KIND]
    written = tensors[:1] if func._schema.name.endswith("_") else []
    others = [
        t for t in tensors
        if t.device != place and (t.ndim > 0 or t.device.type == KIND or func in NO_NUMBERS or any(t is w for w in written))
    ]  # fmt: skip
    if others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} found {place} and "
            + ", ".join(f"{t.device} {list(t.shape)}" for t in others)
        )
    return place


def sent(x: Tensor, place: torch.device) -> Tensor:
    """A copy on another device, outside of autograd."""
    _count("copies")
    if isinstance(x, OnDevice) and place.type == "cpu":
        _count("waits")
    host = _host(x).detach()
    return OnDevice(host.clone(), place) if place.type == KIND else host.to(place, copy=True)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: torch.device) -> Tensor:
        ctx.came = x.device
        return sent(x, place)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return sent(grad[0], ctx.came), None


# ------------------------------------------------------------------------------------------------ calls from Python


class _Calls(TorchFunctionMode):
    """Serves what names a device; everything else goes on as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.data.__set__:
            return _put(*args)
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func in (Tensor.to, Tensor.type_as) and (isinstance(args[0], OnDevice) or _names_one((args[1:], kwargs))):
            return _to(*args, **kwargs)
        if kwargs.get("device") is not None and (_names_one((args, kwargs))):
            return _made(func, args, kwargs)
        return func(*args, **kwargs)


def _names_one(x: Any) -> bool:
    """Whether a pretend device, or a tensor of one, is among these."""
    return any(isinstance(leaf, OnDevice) or str(leaf).startswith(KIND) for leaf in tree_leaves(x))


def _named(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(KIND, device.index or 0) if device.type == KIND else device


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        copies = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype = torch._C._nn._parse_to(*args, **copies)[:2]
    moved = x if device is None else _moved(x, _named(device))
    moved = moved if dtype is None else moved.to(dtype)
    return moved.clone() if kwargs.get("copy") and moved is x else moved


def _moved(x: Tensor, place: torch.device) -> Any:
    return x if x.device == place else _Sent.apply(x, place)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What a call makes on a device that it names: `zeros`, `tensor`, `zeros_like`, `as_tensor`, ..."""
    place, wants = _named(kwargs["device"]), kwargs.pop("requires_grad", False)
    if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
        return _to(*args, **kwargs)
    if func is torch.tensor:
        _count("copies")  # from a list, or from an array
    kwargs["device"] = "cpu" if place.type == KIND else place
    found = _host(func(*args, **kwargs))
    return (OnDevice(found, place) if place.type == KIND else found).requires_grad_(wants)


def _put(x: Tensor, value: Tensor) -> None:
    """`x.data = value`, which is how a module moves; x stays the same object, whatever refers to it."""
    if isinstance(x, OnDevice) == isinstance(value, OnDevice):
        Tensor.data.__set__(x, value)
        if isinstance(x, OnDevice):
            x.host, x.place = value.host, value.place
        return
    other = nn.Parameter(value.detach(), x.requires_grad) if isinstance(x, nn.Parameter) else value.detach()
    grad, version = x.grad, x._version
    x.__class__, other.__class__ = other.__class__, x.__class__
    x.__dict__, other.__dict__ = other.__dict__, x.__dict__
    torch._C._swap_tensor_impl(x, other)
    torch._C._autograd._unsafe_set_version_counter((x,), (version,))
    x.grad = grad


def _by_device(lists: Any, *_: Any) -> Any:
    """Torch's own grouping for the clip of gradients asks C++ for the devices."""
    groups: dict[Any, Any] = {}
    for t in lists[0]:
        groups.setdefault((t.device, t.dtype), ([[]], []))[0][0].append(t)
    return groups


@contextlib.contextmanager
def devices() -> Iterator[None]:
    """Have pretend devices for the length of the block; tensors of them may outlive it, but cannot move."""
    if torch.overrides._get_current_function_mode_stack():
        yield  # they are there
        return
    _register()
    with (
        mock.patch("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", _by_device),
        mock.patch.object(places, "KINDS", (*places.KINDS, KIND)),
        # Transformers' own threads, which read weights, would not have the mode.
        mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
        # Else the mode would be off inside `backward` and `grad`, where functions of the library run.
        mock.patch("torch._tensor.has_torch_function_unary", return_value=False),
        mock.patch("torch.autograd.has_torch_function", return_value=False),
        _Calls(),
    ):
        yield


def _register() -> None:
    """Make the name known to torch, once a process, with what `torch.autocast` and checkpointing ask of a kind of device."""
    if hasattr(torch, KIND):
        return
    torch.utils.rename_privateuse1_backend(KIND)
    backend = ModuleType(KIND)
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    backend.is_available, backend.device_count, backend.current_device = lambda: True, lambda: 2, lambda: 0
    backend._is_in_bad_fork, backend.manual_seed_all = lambda: False, lambda seed: None
    torch._register_device_module(KIND, backend)
