"""What the VAE decodes in, on devices and with versions of their libraries."""

import logging

import pytest
import torch

from utils.devices import choose_decoding_dtype, convolution_fault

BF16, FP32, CUDA = torch.bfloat16, torch.float32, torch.device("cuda")


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "expected"),
    [
        ("2.9.0+cu128", 91002, "torch 2.9.0 has no fast"),
        ("2.9.1", 91500, None),
        ("2.11.0", 90701, None),
        ("2.11.0", 90800, "cuDNN 9.8.0 computes"),
        ("2.11.0+cu130", 91002, "cuDNN 9.10.2 computes"),
        ("2.11.0", 91499, "cuDNN 9.14.99 computes"),
        ("2.13.0+cpu", None, None),
    ],
)
def test_versions_that_compute_convolutions_over_time_wrongly(
    torch_version: str, cudnn: int | None, expected: str | None
) -> None:
    found = convolution_fault(torch_version, cudnn)
    assert found is expected is None or (found or "").startswith(expected or "?")


@pytest.mark.parametrize(
    ("wish", "dtype", "cudnn", "chosen", "said"),
    [
        ("auto", BF16, 91002, FP32, "the VAE decodes in float32"),
        ("bfloat16", BF16, 91002, BF16, "vae_dtype=float32 is safe"),
        ("auto", FP32, 91002, FP32, None),
        ("float32", BF16, 91002, FP32, None),
        ("auto", BF16, 91500, BF16, None),
    ],
)
def test_what_is_wrong_on_this_gpu_is_said_once_and_avoided(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wish: str,
    dtype: torch.dtype,
    cudnn: int,
    chosen: torch.dtype,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with caplog.at_level(logging.WARNING):
        assert choose_decoding_dtype(wish, dtype, CUDA) == chosen
    assert [said in message for message in caplog.messages] == ([True] if said else [])  # type: ignore[operator]
