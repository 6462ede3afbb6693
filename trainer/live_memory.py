"""What is alive in memory while code runs: bytes by part and phase, and operations.

PyTorch's own `FSDPMemTracker` follows one root module; a training here has several networks, which
are called by other methods than `forward`, too.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
ROUNDED = 512  # bytes: what the allocator of CUDA gives at least
TEMPORARY = "activations"
GATHERED, GRADIENTS = "gathered layers", "gradients"

_PLAIN = (Tensor, torch.nn.Parameter)
_scalar = torch.ops.aten._local_scalar_dense.default


@dataclass
class Peak:
    """The most bytes that were alive at once, by part; operations meanwhile."""

    parts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    flops: int = 0


class LiveMemory(TorchDispatchMode):
    """While it is entered, follows all storages of one device; on `META` nothing is computed.

    There tensors have sizes and no memory, a value that is read is 0, or False, and collectives do
    nothing. `phase` and `named` say what bytes belong to.
    """

    def __init__(self, device: torch.device = META, rounded: int = ROUNDED) -> None:
        """`rounded`: bytes that every storage is a multiple of."""
        super().__init__()
        self.device = device
        self.rounded = rounded
        self.live: Counter[str] = Counter()
        self.total = 0
        self.phases: dict[tuple[str, ...], Peak] = {}
        self._now = Peak()
        self._part = TEMPORARY
        self._storages: dict[int, tuple[str, int]] = {}  # part and bytes by address
        self._resize = torch.UntypedStorage.resize_
        self._resized = patch.object(torch.UntypedStorage, "resize_", self._resized_storage())

    def __enter__(self) -> "LiveMemory":
        self._resized.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resized.__exit__(*error)

    @contextmanager
    def phase(self, *name: str) -> Iterator[None]:
        """What happens inside belongs to a phase, but for what belongs to one within it."""
        outside, self._now = self._now, self.phases.setdefault(name, Peak())
        self._see()
        try:
            yield
        finally:
            self._now = outside

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made inside is of this part."""
        outside, self._part = self._part, part
        try:
            yield
        finally:
            self._part = outside

    def named(self, part: str, tensors: Iterable[Tensor]) -> None:
        """From now on these are of this part."""
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            if address in self._storages:
                self._set(address, part, self._storages[address][1])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if FakeTensor in types:  # DTensor finds out shapes
            return func(*args, **kwargs)
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # DTensor calls for its parts
        if func.namespace == "c10d" and self.device == META:
            return self._collective(func, args)
        if func is _scalar and args[0].is_meta:
            return args[0].dtype != torch.bool and 0
        out = func(*args, **kwargs)
        seen = [tensor for tensor in _tensors(out) if tensor.device == self.device]
        for tensor in seen:
            self._track(tensor)
        formula = flop_registry.get(func.overloadpacket) if seen else None
        if formula is not None:
            self._now.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _collective(self, func: Any, args: Sequence[Any]) -> Any:
        """As FSDP2 calls them: what comes out of a reduction stays as gradients."""
        reduces = "reduce_scatter" in func.__name__
        tensors = [*_tensors(args[0]), *(_tensors(args[1]) if len(args) > 1 else ())]
        self.named(GATHERED, (x for x in tensors if x.numel()))
        if reduces:
            self.named(GRADIENTS, _tensors(args[0]))
        work = FakeWork().boxed()
        return work if func in CollectiveOp.WK else (args[0], work)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._storages:
            weakref.finalize(storage, self._freed, address)
            self._set(address, self._part, storage.nbytes())

    def _freed(self, address: int) -> None:
        part, size = self._storages.pop(address)
        self.live[part] -= size
        self.total -= size

    def _set(self, address: int, part: str, size: int) -> None:
        size = -(-size // self.rounded) * self.rounded
        if address in self._storages:
            before, held = self._storages[address]
            self.live[before] -= held
            self.total -= held
        self._storages[address] = (part, size)
        self.live[part] += size
        self.total += size
        self._see()

    def _see(self) -> None:
        if self.total > self._now.size:
            self._now.size = self.total
            self._now.parts = self.live.copy()

    def _resized_storage(self) -> Any:
        original = self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            """What FSDP2 frees and takes again are whole parameters of a layer."""
            out = original(storage, size)
            if storage._cdata in self._storages:
                self._set(storage._cdata, GATHERED, size)
            return out

        return resize_


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
