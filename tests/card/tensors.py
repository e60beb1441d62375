"""Tensors on the imitated card: torch's own for the CPU, over memory of `cuMemAlloc`.

They say that they lie on `cuda:0`. Copies and fills are queued on the current stream, as torch
queues them; all else is computed at once, when what was queued there before has run. That is one
of the orders that a card may take, and other streams see it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from cuda.bindings import driver

from .asking import OnDevice, ask, card_number, current_index, index_of
from .card import Card
from .streams import current_stream, is_current_stream_capturing

# What the imitation itself uses, whatever it puts in torch's place.
_empty, _to, _without_dispatch = torch.empty, torch.Tensor.to, torch._C._DisableTorchDispatch
_POISON = 0xDB

_card: Card
_allocations: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def install(card: Card) -> None:
    """Let torch make such tensors wherever it is asked for one on ``cuda``."""
    global _card
    _card = card
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_strided"):
        setattr(torch, name, _made_on_card(getattr(torch, name)))
    as_tensor = torch.as_tensor
    torch.as_tensor = lambda data, **options: (
        _foreign(data) if hasattr(data, "__cuda_array_interface__") else as_tensor(data, **options)
    )
    torch.Tensor.to = _converted
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False: self.to(
        torch.device("cuda", index_of(device)), non_blocking=non_blocking
    )
    torch.Tensor.pin_memory = lambda self: pinned(self.shape, self.dtype).copy_(self)
    torch.Tensor.is_pinned = _is_pinned


# -- memory --


class _Memory:
    """What a tensor's storage keeps alive."""

    def __init__(self, address: int, num_bytes: int, index: int, owner: object = None) -> None:
        self.address, self.num_bytes, self.index, self.owner = address, num_bytes, index, owner


@cache
def _bytes_of_memory(num_bytes: int) -> Any:
    """A ctypes array whose instances have attributes."""
    return type("Bytes", (ctypes.c_uint8 * num_bytes,), {})


def _over(memory: _Memory, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """A plain tensor of these bytes, whose storage keeps `memory`."""
    kept = _bytes_of_memory(memory.num_bytes).from_address(memory.address)
    kept.memory = memory
    flat = torch.frombuffer(kept, dtype=torch.uint8)
    return flat[: _num_bytes(shape, dtype)].view(dtype).view(shape)


def _num_bytes(shape: Any, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _free_on_device(address: int, index: int, card: int) -> None:
    """In the order of the default stream, as torch hands it out again."""
    if card == card_number():
        with OnDevice(index):
            driver.cuMemFreeAsync(address, 0)


def _spoil_pinned(address: int, num_bytes: int) -> None:
    """torch keeps it for the next who asks, whatever still reads it."""
    ctypes.memset(address, _POISON, num_bytes)


def _at_its_end(memory: _Memory, function: Callable[..., None], *arguments: int) -> None:
    weakref.finalize(memory, function, *arguments).atexit = False


def on_card(shape: Any, dtype: torch.dtype, index: int) -> CardTensor:
    num_bytes = max(1, _num_bytes(shape, dtype))
    with OnDevice(index):
        address = int(ask(driver.cuMemAlloc(num_bytes)))
    memory = _Memory(address, num_bytes, index)
    _at_its_end(memory, _free_on_device, address, index, card_number())
    _allocations[address] = memory
    return _as_card_tensor(_over(memory, shape, dtype))


def _foreign(owner: Any) -> CardTensor:
    """Of an object with `__cuda_array_interface__`, whose memory it is."""
    interface = owner.__cuda_array_interface__
    address, (num_bytes,) = int(interface["data"][0]), interface["shape"]
    assert (interface["typestr"], interface.get("strides")) == ("|u1", None)
    current_index()
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    index = int(ask(driver.cuPointerGetAttribute(kind, address)))
    _allocations[address] = memory = _Memory(address, num_bytes, index, owner)
    return _as_card_tensor(_over(memory, (num_bytes,), torch.uint8))


def pinned(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Host memory of `cuMemHostAlloc`, which is never freed: when the tensor goes its bytes do."""
    current_index()
    num_bytes = max(1, _num_bytes(shape, dtype))
    address = int(ask(driver.cuMemHostAlloc(num_bytes, 0)))
    memory = _Memory(address, num_bytes, -1)
    _at_its_end(memory, _spoil_pinned, address, num_bytes)
    return _over(memory, shape, dtype)


def _is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    if isinstance(self, CardTensor):
        return False
    current_index()
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    error, found = driver.cuPointerGetAttribute(kind, self.data_ptr())
    return int(error) == 0 and int(found) == int(driver.CUmemorytype.CU_MEMORYTYPE_HOST)


# -- tensors --


def _as_card_tensor(plain: torch.Tensor) -> CardTensor:
    return torch.Tensor._make_subclass(CardTensor, plain)


class CardTensor(torch.Tensor):
    @property
    def device(self) -> torch.device:
        memory = _allocations.get(self.untyped_storage().data_ptr())
        return torch.device("cuda", 0 if memory is None else memory.index)

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return int(self.device.index)

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self) -> str:
        return f"{self.cpu()!r} on {self.device}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


_VIEWS = {torch.ops.aten.set_.source_Storage_storage_offset, torch.ops.aten.detach.default}


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    schema = func._schema
    writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    gives_view = any(r.alias_info is not None for r in schema.returns) and not any(writes)
    if func in _VIEWS or gives_view:
        with _without_dispatch():
            return _wrapped(func(*args, **kwargs), args)
    on = next((each.device for each in args if isinstance(each, CardTensor)), None)
    with OnDevice(on):
        return _run(func, args, kwargs, writes)


def _run(func: Any, args: Any, kwargs: Any, writes: list[bool]) -> Any:
    """On the current stream of the current device."""
    if any(writes) and is_current_stream_capturing():
        return args[0]  # of the graph, which nothing ever launches
    queue = _QUEUED.get(func)
    if queue is not None and queue(*args, **kwargs):
        return args[0]
    current_stream().synchronize()
    with _without_dispatch():
        made = func(*args, **kwargs)
    for argument, is_written in zip(args, writes, strict=False):
        if is_written and isinstance(argument, CardTensor):
            _mark_written(argument)
    if any(writes):
        return made
    return torch.utils._pytree.tree_map_only(torch.Tensor, _moved_to_card, made)


def _wrapped(made: Any, args: Any) -> Any:
    """Views of what lies on the card; in place, the tensor itself."""
    if made is args[0]:
        return made
    return torch.utils._pytree.tree_map_only(torch.Tensor, _as_card_tensor, made)


def _moved_to_card(result: torch.Tensor) -> CardTensor:
    with _without_dispatch():
        made = on_card(result.shape, result.dtype, current_index())
        made.copy_(result)
    _mark_written(made)
    return made


def _mark_written(tensor: torch.Tensor) -> None:
    """From its first byte to its last."""
    if tensor.numel():
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        _card.mark_written(tensor.data_ptr(), (reach + 1) * tensor.element_size())


# -- what is queued --


def _queue_fill(tensor: CardTensor, value: Any = 0) -> bool:
    if isinstance(value, torch.Tensor) and not isinstance(value, CardTensor):
        value = value.item()
    plain = isinstance(value, int) and (tensor.element_size() == 1 or value == 0)
    if not plain or not tensor.is_contiguous():
        return False
    address, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    ask(driver.cuMemsetD8Async(address, value % 256, num_bytes, current_stream().cuda_stream))
    return True


def _queue_copy(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> bool:
    if dst.dtype != src.dtype or dst.shape != src.shape:
        return False
    if not (dst.is_contiguous() and src.is_contiguous()):
        return False
    num_bytes, stream = dst.numel() * dst.element_size(), current_stream()
    ask(driver.cuMemcpyAsync(dst.data_ptr(), src.data_ptr(), num_bytes, stream.cuda_stream))
    if not non_blocking and not (isinstance(dst, CardTensor) and isinstance(src, CardTensor)):
        stream.synchronize()
    return True


_QUEUED = {
    torch.ops.aten.zero_.default: _queue_fill,
    torch.ops.aten.fill_.Scalar: _queue_fill,
    torch.ops.aten.fill_.Tensor: _queue_fill,
    torch.ops.aten.copy_.default: _queue_copy,
}


# -- from one to the other --


def _converted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.Tensor.to`."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    here, dtype = isinstance(self, CardTensor), dtype or self.dtype
    if device is None:
        device = self.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", current_index())
    if not here and device.type != "cuda":
        return _to(self, device, dtype, copy=copy)
    if device == self.device and dtype == self.dtype and not copy:
        return self
    source = self if dtype == self.dtype else self.type(dtype)
    if device.type == "cuda":
        target: torch.Tensor = on_card(self.shape, dtype, device.index)
    else:
        target = _empty(self.shape, dtype=dtype)
    if not source.is_contiguous():
        source = source.contiguous()
    return target.copy_(source, non_blocking=non_blocking)


def _made_on_card(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of torch's that makes tensors, on the card where it is asked to."""

    def call(*args: Any, **options: Any) -> torch.Tensor:
        device, pin = options.get("device"), options.pop("pin_memory", False)
        if device is not None and torch.device(device).type == "cuda":
            options["device"] = "cpu"
            plain = make(*args, **options)
            made = on_card(plain.shape, plain.dtype, index_of(device))
            return made if "empty" in make.__name__ else made.copy_(plain)
        plain = make(*args, **options)
        return pinned(plain.shape, plain.dtype).copy_(plain) if pin else plain

    return call
