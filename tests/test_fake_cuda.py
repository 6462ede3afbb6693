"""The stand-in for a GPU sees what a GPU would refuse, and what the host would wait for."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampling import OdeStep, Sampler
from tests.fake_cuda import CUDA, FakeCuda, fused
from utils.devices import to_device, to_host


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


def on_device(*shape: int) -> Tensor:
    return torch.empty(shape, device=CUDA)


WAITS: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "a number": (lambda: on_device(1).item(), {"a value": 1}),
    "a condition": (lambda: bool(on_device(2).isfinite().all()), {"a value": 1}),
    "pageable memory": (lambda: torch.ones(2).to(CUDA), {"a copy to the device": 1}),
    "pageable, said not to": (
        lambda: torch.ones(2).to(CUDA, non_blocking=True),
        {"a copy to the device": 1},
    ),
    "values": (lambda: torch.tensor([1, 2], device=CUDA), {"a copy to the device": 1}),
    "an index": (lambda: on_device(4)[torch.tensor([1])], {"an index from the host": 1}),
    "results": (lambda: on_device(4).cpu(), {"a copy to the host": 1}),
    "pinned memory": (lambda: to_device(torch.ones(2), CUDA), {}),
    "results, once": (lambda: to_host(on_device(4), on_device(2)), {"an event": 1}),
    "a scalar": (lambda: on_device(4) * torch.tensor(2.0), {}),
}


@pytest.mark.parametrize("case", WAITS)
def test_the_host_waits_for(cuda: FakeCuda, case: str) -> None:
    act, waits = WAITS[case]
    with cuda.measured() as counts:
        act()
    assert dict(counts.waits) == waits


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_device(2) + torch.ones(2),
        lambda: torch.cat([on_device(2), torch.ones(2)]),
        lambda: on_device(2, 2) @ torch.ones(2, 2),
        lambda: on_device(4).index_select(0, torch.tensor([1])),
    ],
)
def test_devices_do_not_mix(cuda: FakeCuda, mix: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix()


def test_bytes_operations_and_memory(cuda: FakeCuda) -> None:
    """A product of [4, 8] and [8, 16], then two kernels over the 64 results in float32."""
    left, right = on_device(4, 8), on_device(8, 16)
    with cuda.measured() as counts:
        out = (left @ right).relu().add_(1)
    assert (counts.ops, counts.flop) == (3, 2 * 4 * 8 * 16)
    assert counts.multiplied == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert counts.moved == 4 * (2 * 64 + 64)
    assert (counts.live, counts.peak) == (4 * 64, 2 * 4 * 64)
    del out
    assert counts.live == 0


def test_the_bias_of_a_convolution_is_added_in_a_kernel_of_its_own(cuda: FakeCuda) -> None:
    """cuDNN adds none; a compiler does it with what comes next."""
    x, weight, bias = on_device(1, 4, 8, 8), on_device(6, 4, 3, 3), on_device(6)
    for added in (False, True):
        with cuda.measured() as counts:
            F.conv2d(x, weight, bias if added else None, padding=1)
        assert (counts.ops, counts.moved) == (1 + added, added * 2 * 4 * 6 * 8 * 8)


@pytest.mark.slow
def test_what_a_compiler_fuses_is_read_and_written_once(cuda: FakeCuda) -> None:
    """A norm, an activation and a copy behind the past in one kernel; a bias and a sum in another.

    Both convolutions read and write as they do without a compiler, channels last.
    """
    x, past = (
        on_device(1, 32, frames, 8, 8).to(memory_format=torch.channels_last_3d) for frames in (4, 2)
    )
    weight = on_device(32, 32, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    scale, bias = on_device(32), on_device(32)

    def block(x: Tensor, past: Tensor) -> Tensor:
        normed = F.rms_norm(x.movedim(1, -1), (32,), scale).movedim(-1, 1)
        seen = torch.cat([past, F.silu(normed)], dim=2)
        return x + F.conv3d(seen, weight, bias, padding=(0, 1, 1))

    with torch.no_grad():
        counts = fused(block, x, past)
    kernels = [2 * x.nbytes + scale.nbytes, 2 * past.nbytes, 3 * x.nbytes + bias.nbytes]
    assert (counts.ops, counts.moved) == (4, sum(kernels))
    assert counts.multiplied == 2 * x.nbytes + past.nbytes + weight.nbytes


def test_a_slice_counts_as_what_is_read_of_it(cuda: FakeCuda) -> None:
    x = on_device(8, 64)
    counts = fused(lambda x: x[:2] + x[1:3], x)
    assert (counts.ops, counts.moved) == (1, 3 * 2 * 64 * 4)


def test_what_is_on_the_cpu_is_real(cuda: FakeCuda) -> None:
    assert torch.arange(3).sum().item() == 3
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_a_solver_reads_nothing_from_the_device(cuda: FakeCuda, sampler: Sampler) -> None:
    """Each looked its step up on the device, and waited for what it found, at every block.

    What diffusers' UniPC sends there itself, some coefficients, is left.
    """
    rule = OdeStep.with_steps(sampler, 4, 5.0)
    x = on_device(1, 3, 16, 4, 6)
    with cuda.measured() as counts:
        for level in range(4):
            x = rule.advance(0, level, x, x, last=level == 3)
    assert set(counts.waits) <= ({"a copy to the device"} if sampler == "unipc" else set())
