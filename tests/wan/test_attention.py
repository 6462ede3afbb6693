"""Attention against a softmax written out, and the choice of its kernel."""

import pytest
import torch
from torch import Tensor

from utils.errors import UserError
from wan import attention as module
from wan.attention import attention, best_backend, check_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def some_heads(tokens: int, seed: int) -> Tensor:
    return torch.randn(2, tokens, 3, 16, generator=torch.Generator().manual_seed(seed))


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_softmax_attention(dtype: torch.dtype, atol: float, masked: bool) -> None:
    q, k, v = (some_heads(n, seed).to(dtype) for seed, n in enumerate((5, 9, 9)))
    mask = None
    if masked:
        mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) > 0.5
        mask[:, 0] = True
    out = attention(q, k, v, mask=mask)
    assert out.dtype == dtype
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), naive(q, k, v, mask), atol=atol, rtol=0)


def test_explicit_attention_errs_little_more_than_the_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16, against float64: the output and all gradients."""
    heads = [some_heads(n, seed).bfloat16() for seed, n in enumerate((5, 9, 9))]

    def outcome(limit: int, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(module, "MAX_EXPLICIT_SCORES", limit)
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in heads)
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out.double().square().sum(), (q, k, v))
        return [out.detach().double(), *(g.double() for g in gradients)]

    exact = outcome(0, torch.float64)
    explicit, fused = outcome(10**6, torch.bfloat16), outcome(0, torch.bfloat16)
    for ours, theirs, truth in zip(explicit, fused, exact, strict=True):
        assert (ours - truth).norm() < 2 * (theirs - truth).norm()


def test_one_sample_takes_the_same_kernel_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = some_heads(6, 0).bfloat16()
    monkeypatch.setattr(module, "MAX_EXPLICIT_SCORES", 3 * 6 * 6)
    together = attention(q, q, q)
    for row in range(2):
        alone = q[row : row + 1]
        assert torch.equal(attention(alone, alone, alone), together[row : row + 1])


def test_masked_keys_have_no_influence() -> None:
    q, k, v = (some_heads(4, seed) for seed in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    before = attention(q, k, v, mask=mask)
    k[:, 3], v[:, 3] = 100.0, 100.0
    after = attention(q, k, v, mask=mask)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: tuple[str, ...] = (),
    cudnn: bool = True,
) -> None:
    """A machine with such a GPU, whose name nobody may ask for."""

    def no_name(*_: object) -> str:
        raise AssertionError("a kernel was chosen by the name of the device")

    monkeypatch.setattr(torch.cuda, "get_device_name", no_name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", no_name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)
    monkeypatch.setattr(module, "_installed", lambda package: package in installed)


FLASH3, FLASH2 = "flash_attn_interface", "flash_attn"


@pytest.mark.parametrize(
    ("capability", "installed", "cudnn", "dtype", "expected"),
    [
        ((9, 0), (FLASH3, FLASH2), True, torch.bfloat16, "flash3"),
        ((9, 0), (FLASH2,), True, torch.bfloat16, "cudnn"),
        ((9, 0), (), True, torch.float16, "cudnn"),
        ((9, 0), (FLASH2,), False, torch.bfloat16, "flash2"),
        ((10, 0), (FLASH3,), True, torch.bfloat16, "sdpa"),
        ((12, 0), (FLASH2,), True, torch.bfloat16, "flash2"),
        ((8, 0), (FLASH3, FLASH2), True, torch.bfloat16, "flash2"),
        ((8, 9), (FLASH2,), False, torch.bfloat16, "flash2"),
        ((8, 0), (), False, torch.bfloat16, "sdpa"),
        ((7, 5), (FLASH2,), True, torch.float16, "sdpa"),
        ((9, 0), (FLASH3,), True, torch.float32, "sdpa"),
    ],
)
def test_kernel_is_chosen_by_capability(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    cudnn: bool,
    dtype: torch.dtype,
    expected: str,
) -> None:
    """A search for "h100" in the device's name would give an H200 the slow kernel.

    cuDNN's kernel was taken from capability 8 on; it is slower than flash but on 9.
    """
    pretend(monkeypatch, capability, installed, cudnn)
    assert best_backend(CUDA, dtype) == expected


def test_cpu_uses_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), (FLASH3,))
    assert best_backend(CPU, torch.bfloat16) == "sdpa"


def test_auto_takes_the_best_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("flash2", "sdpa"):
        monkeypatch.setitem(
            module._KERNELS, name, lambda q, k, v, name=name: taken.append(name) or q
        )
    monkeypatch.setattr(module, "best_backend", lambda *_: "flash2")
    q = some_heads(2, 0)
    attention(q, q, q)
    attention(q, q, q, backend="sdpa")
    assert taken == ["flash2", "sdpa"]


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_backends_that_run_everywhere(backend: str) -> None:
    assert check_backend(backend, CPU, torch.float32) == backend


def test_backend_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), (FLASH3, FLASH2))
    for backend in ("flash3", "flash2", "cudnn"):
        assert check_backend(backend, CUDA, torch.bfloat16) == backend


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "sentence"),
    [
        ("flash9", CPU, torch.float32, r"flash9 is unknown; choose one of auto, flash3"),
        ("flash2", CPU, torch.bfloat16, r"needs a CUDA device and bf16 or fp16, not cpu"),
        ("cudnn", CUDA, torch.float32, r"not cuda with float32; use attention_backend=auto"),
        ("flash3", CUDA, torch.bfloat16, r"needs compute capability 9"),
        ("flash2", CUDA, torch.bfloat16, r"needs the package flash_attn; install it"),
    ],
)
def test_backend_that_cannot_run_says_why(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sentence: str,
) -> None:
    pretend(monkeypatch, (8, 0), (FLASH3,))
    with pytest.raises(UserError, match=sentence):
        check_backend(backend, device, dtype)
