"""CUDA without a GPU: tensors on `cuda:0` that have sizes and no memory; what is done is counted.

Tensors on the CPU stay real. What touches a fake one runs under PyTorch's `FakeTensorMode`, which
knows the shapes, strides and devices of every operation, and refuses to mix devices and to guess
sizes that depend on values (`nonzero`). So networks of any size run on any machine, in seconds, and
everything but the numbers is as on a GPU: a value that is read is 1, or True.

`FakeCuda.measured` counts what runs kernel by kernel; `fused` what torch.compile makes of it.
"""

import ctypes
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor
from torch._inductor import scheduler
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda:0")  # with its index: without one PyTorch would ask the driver
META = torch.device("meta")  # for backward passes: autograd of a CPU build refuses CUDA's
GB, GIB, TERA = 10**9, 2**30, 10**12

aten = torch.ops.aten
VIEWS = """view _unsafe_view transpose permute expand slice select unbind split split_with_sizes
    unsqueeze squeeze detach alias t as_strided _reshape_alias unfold diagonal lift_fresh
    view_as_real view_as_complex"""
NEW = "empty empty_like empty_strided new_empty new_empty_strided"
NO_KERNEL = {*VIEWS.split(), *NEW.split()}
MULTIPLIES = ("mm", "addmm", "bmm", "baddbmm")


@dataclass
class Counts:
    """What was asked of the device, and what the host waited for.

    `moved`: bytes read and written by copies and elementwise kernels. `multiplied`: the same of
    matrix products, attention and convolutions. `live`: bytes alive of what was made meanwhile;
    `peak`: the most of these. `sent`: copies to the device. `waits`: reasons for which the host had
    to wait, and how often.
    """

    ops: int = 0
    flop: int = 0
    moved: int = 0
    multiplied: int = 0
    live: int = 0
    peak: int = 0
    sent: int = 0
    waits: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"ops {self.ops}, {self.flop / TERA:.2f} TFLOP, moved {self.moved / GB:.1f} GB, "
            f"multiplied {self.multiplied / GB:.1f} GB, peak {self.peak / GIB:.2f} GiB, "
            f"waits {dict(self.waits)}"
        )


class FakeCuda(TorchDispatchMode):
    """While it is entered, `CUDA` is a device of compute capability 9 without memory.

    `device`: another one whose work is counted (`META`).
    """

    def __init__(self, device: torch.device = CUDA) -> None:
        super().__init__()
        self.device = device
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so PyTorch looks for no driver
        self._watching: list[Counts] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: set[int] = set()  # storages that are alive
        self._pinned: set[int] = set()
        self._patches = ExitStack()

    def __enter__(self) -> "FakeCuda":
        _guard()
        entered = super().__enter__()
        with ExitStack() as patches:
            for owner, name, stand_in in (
                (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
                (torch.cuda, "Event", lambda **_: _Event(self)),
                (torch.cuda, "current_stream", lambda *_: None),
                (torch.backends.cudnn, "is_available", lambda: True),
                (F, "scaled_dot_product_attention", _attention),
                (F, "rms_norm", _norm),
                (torch._C, "_conv_determine_backend_memory_format", _order_of_convolution),
            ):
                patches.enter_context(patch.object(owner, name, stand_in))
            before = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=CUDA) is a copy
            patches.callback(torch._C._set_only_lift_cpu_tensors, before)
            self._patches = patches.pop_all()
        return entered

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    @contextmanager
    def measured(self) -> Iterator[Counts]:
        """The counts of what happens inside."""
        counts = Counts()
        self._watching.append(counts)
        try:
            yield counts
        finally:
            self._watching.remove(counts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet, kwargs = func.overloadpacket, dict(kwargs or {})
        if packet is torch.ops.prim.device:
            return args[0].fake_device
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet is aten.is_pinned:
            return _key(args[0]) in self._pinned
        if packet is aten._pin_memory:
            return self._pin(args[0].clone())
        pinned = kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        on_device = device is not None and torch.device(device).type == self.device.type
        if not on_device and not any(isinstance(x, FakeTensor) for x in inputs):
            out = func(*args, **kwargs)
            return self._pin(out) if pinned else out
        if packet is aten._local_scalar_dense:
            if self._has(args[0]):
                self._wait("a value")
            return args[0].dtype == torch.bool or 1
        with self._fake:
            out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(map(self._has, (*inputs, *outputs))):
            self._track(outputs)
            self._count(packet, args, kwargs, out, inputs, outputs)
        return out

    def _has(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type

    def _pin(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        self._pinned.add(key)
        weakref.finalize(tensor.untyped_storage(), self._pinned.discard, key)
        return tensor

    def _track(self, outputs: Sequence[Tensor]) -> None:
        for tensor in outputs:
            key, storage = _key(tensor), tensor.untyped_storage()
            if self._has(tensor) and key not in self._known:
                self._known.add(key)
                watching, size = tuple(self._watching), storage.nbytes()
                weakref.finalize(storage, self._freed, key, size, watching)
                for counts in watching:
                    counts.live += size
                    counts.peak = max(counts.peak, counts.live)

    def _freed(self, key: int, size: int, watching: Sequence[Counts]) -> None:
        self._known.discard(key)
        for counts in watching:
            counts.live -= size

    def _wait(self, reason: str) -> None:
        for counts in self._watching:
            counts.waits[reason] += 1

    def _count(
        self,
        packet: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        name = packet.__name__
        if packet in (aten._to_copy, aten.copy_):
            source = args[1] if packet is aten.copy_ else args[0]
            if self._has(source) != self._has(out):
                self._count_transfer(source, out, packet is aten._to_copy, args, kwargs)
                return
        if packet is aten.index and any(x.device.type == "cpu" for x in inputs[1:]):
            self._wait("an index from the host")
        if name in NO_KERNEL:
            return
        size, formula = _bytes(packet, args, inputs, outputs), flop_registry.get(packet)
        flop = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        multiplies = name in MULTIPLIES or "convolution" in name or "attention" in name
        adds = (
            packet is aten.convolution and args[2] is not None
        )  # cuDNN leaves the bias to PyTorch
        for counts in self._watching:
            counts.ops += 1 + adds
            counts.flop += flop
            counts.moved += 2 * _unique(outputs[0]) * adds if multiplies else size
            counts.multiplied += size if multiplies else 0

    def _count_transfer(
        self, source: Tensor, out: Tensor, new: bool, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """A copy between host and device: without waiting only by way of pinned memory."""
        asked = kwargs.get("non_blocking", False) or (not new and len(args) > 2 and args[2])
        if self._has(out):
            for counts in self._watching:
                counts.sent += 1
        if self._has(out) and not (asked and _key(source) in self._pinned):
            self._wait("a copy to the device")
        if self._has(source) and not (asked and (new or _key(out) in self._pinned)):
            self._wait("a copy to the host")


class _Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device

    def record(self, stream: Any = None) -> None:
        """Nothing runs, so nothing is awaited."""

    def synchronize(self) -> None:
        """The host would wait here."""
        self._device._wait("an event")


def made_on(device: torch.device, module: nn.Module, dtype: torch.dtype) -> None:
    """Fake weights on `device` take the place of a network's own; no gradient."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=dtype, device=device)
                part._parameters[name] = nn.Parameter(made, requires_grad=False)


# --- compiled ------------------------------------------------------------------------------------


def fused(
    function: Callable[..., object], *args: Any, options: Mapping[str, Any] | None = None
) -> Counts:
    """The kernels that Inductor makes of `function(*args)` for an H200, and what these move.

    `options`: of `torch.compile`.

    The call becomes one graph of static shapes, without a break; nothing runs. Of every kernel
    that is generated each buffer counts once: the elements that it reads or writes, at most the
    whole buffer. What is made and used within a kernel counts nothing. Only inside of `FakeCuda`.
    """
    counts = Counts()

    def count(graph: GraphLowering) -> SimpleNamespace:
        graph.init_wrapper_code()
        graph._update_scheduler()  # it fuses
        for node in graph.scheduler.nodes:
            _count_kernel(node, counts)
        return SimpleNamespace(call=_stop)

    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(inductor.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(inductor.patch(dict(options or {})))
        stack.enter_context(_disable_current_modes())
        for owner, name, stand_in in (
            (GraphLowering, "compile_to_module", count),
            (DeviceProperties, "create", lambda device: _H200),
            (CudaInterface, "is_bf16_supported", lambda **_: True),
            (scheduler, "has_triton", lambda: True),
            (F, "rms_norm", _real_norm),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        try:
            torch.compile(function, fullgraph=True, dynamic=False)(*args)
        except _CountedError:
            return counts
        finally:
            torch._dynamo.reset()
    raise AssertionError("nothing was compiled")


class _CountedError(Exception):
    """The graph is counted; it cannot run."""


def _stop(args: object) -> None:
    raise _CountedError


_H200 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)


def _count_kernel(node: scheduler.BaseSchedulerNode, counts: Counts) -> None:
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        size, name = node.get_read_write_buffers_sizes(), type(node.node).__name__.lower()
        kernel = f"{name} {getattr(node.node, 'python_kernel_name', '')}".lower()
        if name == "multioutput":
            return
        multiplies = any(word in kernel for word in ("convolution", "attention", *MULTIPLIES))
    elif isinstance(node, scheduler.NopKernelSchedulerNode):
        return
    else:
        size, multiplies = _accessed(node), node.is_template()
    counts.ops += 1
    counts.moved += 0 if multiplies else size
    counts.multiplied += size if multiplies else 0


def _accessed(node: scheduler.BaseSchedulerNode) -> int:
    """Bytes of the buffers that it reads, and of those that it writes for others.

    Of a buffer in which an index chooses rows, those rows. That something is written in place is
    no reading of it.
    """
    own, total = set(node.get_nodes()), 0
    reads = [access for access in node.read_writes.reads if isinstance(access, MemoryDep)]
    outputs = [
        access
        for access in node.read_writes.writes
        if isinstance(access, MemoryDep)
        and {user.node for user in node.scheduler.name_to_buf[access.name].users} - own
    ]
    indices = [access.name for access in reads if V.graph.get_dtype(access.name) == torch.int64]
    chosen = max((_elements(name) for name in indices), default=0)
    for accesses in (reads, outputs):
        sizes: Counter[str] = Counter()
        limits: dict[str, int] = {}
        for access in accesses:
            sizes[access.name] += V.graph.get_dep_size_hint(access)
            limits[access.name] = _elements(access.name) * V.graph.get_dtype(access.name).itemsize
            if access.is_indirect():
                limits[access.name] = limits[access.name] * chosen // _rows(access)
        total += sum(min(size, limits[name]) for name, size in sizes.items())
    return total


def _elements(name: str) -> int:
    return math.prod(int(n) for n in V.graph.get_buffer(name).get_size())


def _rows(access: MemoryDep) -> int:
    """Rows of which an index chooses some: the size of the dimension that it steps through."""
    (step,) = {
        int(access.index.coeff(symbol))
        for symbol in access.index.free_symbols
        if symbol not in access.var_names
    }
    layout = V.graph.get_buffer(access.name).get_layout()
    strides = [int(stride) for stride in layout.stride]
    return int(layout.size[strides.index(step)])


# --- what a CPU build lacks ----------------------------------------------------------------------


def _guard() -> None:
    """Switching to a device that is not there does nothing, in a build without CUDA too.

    `FakeTensorMode` sees to it in a CUDA build alone. The table of guards has one per type of
    device; the one of the meta device is empty and serves as well.
    """
    if torch.version.cuda is not None:
        return
    cuda, meta, types = 1, 14, 21  # c10/core/DeviceType.h
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * types).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[cuda] = guards[cuda] or guards[meta]


_real_attention = F.scaled_dot_product_attention
_real_norm = F.rms_norm


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **settings: Any) -> Tensor:
    """A fused kernel on the device; a CPU build would take the path that writes all scores."""
    if q.device.type == "cpu":
        return _real_attention(q, k, v, attn_mask=attn_mask, **settings)
    if attn_mask is not None:  # of the text encoder; our own masks go through FlexAttention
        assert attn_mask.dtype != torch.bool, "masks on the device go through FlexAttention"
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _order_of_convolution(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """As cuDNN's results lie: channels together where one of its inputs has them so."""
    together = {4: torch.channels_last, 5: torch.channels_last_3d}[weight.ndim]
    either = any(
        part.is_contiguous(memory_format=together) and not part.is_contiguous()
        for part in (x, weight)
    )
    return together if either and x.dtype != torch.float64 else torch.contiguous_format


def _norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """One kernel on the device; a CPU build takes it apart."""
    if x.device.type == "cpu":
        return _real_norm(x, shape, weight, eps)
    assert weight is not None
    return _fused_norm(x, weight)


@torch.library.custom_op("fake_cuda::rms_norm", mutates_args=())
def _fused_norm(x: Tensor, weight: Tensor) -> Tensor:
    raise AssertionError("only ever runs on fake tensors")


@torch.library.custom_op("fake_cuda::rms_norm_backward", mutates_args=())
def _fused_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("only ever runs on fake tensors")


_fused_norm.register_fake(lambda x, weight: torch.empty_like(x))
_fused_norm_backward.register_fake(
    lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight))
)
_fused_norm.register_autograd(
    lambda ctx, grad: _fused_norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# --- bytes ---------------------------------------------------------------------------------------


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unique(tensor: Tensor) -> int:
    """Bytes that are there: an expanded axis is stored once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, step in sides if step) * tensor.element_size()


def _bytes(packet: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Any) -> int:
    """Bytes that a kernel reads and writes, each place once."""
    if packet in (aten.index_select, aten.index):
        return 2 * _unique(outputs[0])
    if packet is aten.index_copy_:
        return 2 * _unique(args[3])
    if packet is aten.copy_:
        return _unique(args[0]) + _unique(args[1])
    if packet in (aten.fill_, aten.zero_):
        return _unique(args[0])
    read = {(_key(x), x.storage_offset(), x.shape): _unique(x) for x in inputs}
    written = {(_key(x), x.storage_offset(), x.shape): _unique(x) for x in outputs}
    return sum((read | written).values())
