"""What an inference will hold in memory, from sizes alone, before anything is loaded.

Weights and cache are exact. What is alive for a while is a multiple of the tokens and pixels; the
multiples were counted at the published sizes, and tests/test_small_cards.py holds them against what
is counted today. Nothing here was measured on a GPU.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pipeline.setup import Setup
from pipeline.text import encoder_bytes, encoder_dtype
from utils.config import VIDEO_KEYS, config_of
from utils.devices import (
    choose_device,
    choose_dtype,
    free_bytes,
    is_out_of_memory,
)
from utils.errors import UserError
from utils.profiles import PROFILES, overrides_of
from wan.checkpoints import memory_estimate
from wan.folders import file_bytes

logger = logging.getLogger(__name__)

GIB = 2**30
CONTEXT = 3 * GIB // 2
"""Of a GPU, for CUDA itself, workspaces of its libraries, and gaps between tensors: a guess."""

# Values alive at the widest place of a forward.
HIDDEN_COPIES, TOKEN_COPIES = 2, 5  # of the feed-forward's hidden layer; of its input, per query
HIDDEN_COPIES_FLOAT8 = 2.5
KEY_COPIES = 10  # of the keys that one pass sees
# Of the VAE with 96 channels, whose file has so many bytes; narrower ones have less in proportion.
VAE_BYTES, TEXT_ENCODER_BYTES = 507_570_124, 11_361_820_672
ENCODER = 0.423  # of these; it encodes in float32
STATE_VALUES = 2366  # for each pixel of a frame: what a stream carries from block to block
DECODING_VALUES = 5940  # for each pixel: while a block is decoded, the next state included
DECODING_VALUES_FRUGAL = 3640
TEXT_BYTES = 2**27  # while the text encoder of 10.6 GiB encodes 512 tokens

SMALLER = "close other programs, or use a smaller resolution (height=… width=…)"


class Phase(NamedTuple):
    """What is held at one time, by part, in bytes."""

    doing: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of it all."""
        return sum(self.parts.values())


def phases(setup: Setup, dtype: torch.dtype) -> list[Phase]:
    """What is needed where the generator is: to encode prompts, then to make videos.

    The text encoder is freed in between (`TextSource.encode_once`); where it is elsewhere, or
    prompts are encoded already, there is one phase.
    """
    found = []
    text = encoder_bytes(_file_sizes(setup)[0], encoder_dtype(dtype))
    beside = _is_beside(setup.machine.text_encoder_device, setup.machine.device)
    if text and not setup.text_embeddings and beside:
        found.append(Phase("encode prompts", {"text encoder": text, "activations": TEXT_BYTES}))
    return [*found, Phase("make videos", _making(setup, dtype))]


def needed(setup: Setup, dtype: torch.dtype) -> int:
    """Bytes of a GPU that a batch inference needs, CUDA's own included."""
    return max(phase.total for phase in phases(setup, dtype)) + CONTEXT


def room_for_videos(setup: Setup, dtype: torch.dtype) -> int:
    """Bytes that making a video takes of a GPU beside the transformer, which is there already."""
    parts = _making(setup, dtype)
    return sum(parts.values()) - parts["transformer"]


def step_bytes(setup: Setup, dtype: torch.dtype) -> int:
    """Bytes that are alive for a while in a step, beside the networks and what streams keep."""
    return _making(setup, dtype)["activations"]


def memory_report(setup: Setup, dtype: torch.dtype) -> str:
    """One line: what is needed while prompts are encoded, and then while videos are made."""
    said = ", then ".join(
        f"{readable(phase.total)} to {phase.doing} "
        f"({', '.join(f'{name} {readable(size)}' for name, size in phase.parts.items() if size)})"
        for phase in phases(setup, dtype)
    )
    return f"memory needed: about {said}"


def readable(size: int) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


# --- what would fit ------------------------------------------------------------------------------


def with_profile(setup: Setup, name: str) -> Setup:
    """The setup under a profile, all of whose keys are taken."""
    return setup.under(config_of(setup.resolved, "this setup", overrides_of(PROFILES[name])))


def advice(setup: Setup, available: int) -> str:
    """What to do where a GPU with so many bytes is too small, to follow a semicolon."""
    dtype = choose_dtype(setup.machine.dtype, torch.device("cuda"))
    ours = needed(setup, dtype)
    for name in PROFILES:
        size = needed(with_profile(setup, name), dtype)
        if size < ours and size <= available:
            changed = ", ".join(overrides_of(PROFILES[name]))
            return f"--profile {name} ({changed}) needs about {readable(size)}"
    return f"{SMALLER}, or --device cpu"


def fitted(setup: Setup) -> Setup:
    """The setup for the free memory of its GPU: under the first profile that makes it fit.

    Profiles that would make another video are not chosen, but named. What is chosen is said.
    """
    device = choose_device(setup.machine.device)
    if device.type != "cuda" or setup.folder is None:
        return setup
    dtype, free = choose_dtype(setup.machine.dtype, device), free_bytes(device)
    ours = needed(setup, dtype)
    if ours <= free:
        return setup
    for name, profile in PROFILES.items():
        smaller = with_profile(setup, name)
        if not profile.keys() & VIDEO_KEYS and needed(smaller, dtype) <= free:
            logger.info("profile %s, for the free memory of the GPU", name)
            return smaller
    logger.warning(
        "the GPU has %s free, and about %s may be needed; %s",
        *(readable(free), readable(ours), advice(setup, free)),
    )
    return setup


def what_fits(setup: Setup) -> str:
    """What to do where memory has ended, to follow a semicolon or a colon."""
    device = choose_device(setup.machine.device)
    if setup.folder is None or device.type != "cuda":
        return SMALLER
    return advice(setup, torch.cuda.mem_get_info(device)[1])


@contextmanager
def memory_in_words(setup: Setup) -> Iterator[None]:
    """One sentence where memory ends, which says what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"there is too little memory for this; {what_fits(setup)}") from error


# --- parts ---------------------------------------------------------------------------------------


def _making(setup: Setup, dtype: torch.dtype) -> dict[str, int]:
    machine, sizes, shape = setup.machine, setup.sizes, setup.shape
    rows = 1 if setup.distilled else 2  # guidance runs every video twice
    cache = setup.cache(sizes, batch=rows, dtype=dtype, device=torch.device("meta")).num_bytes
    cache //= machine.sequence_parallel  # each rank of a team keeps its heads
    decoding = dtype if machine.vae_dtype == "auto" else getattr(torch, machine.vae_dtype)
    weights = _file_sizes(setup)[1]  # the published ones are in fp32
    if not _is_beside(machine.vae_device, machine.device):
        weights = 0  # the VAE is elsewhere
    values = shape.height * shape.width * math.sqrt(weights / VAE_BYTES)
    pixels = round(values) * decoding.itemsize
    while_decoding = DECODING_VALUES_FRUGAL if machine.vae_frugal else DECODING_VALUES
    text = 2 * sizes.num_layers * sizes.text_len * sizes.dim * rows * dtype.itemsize
    return {
        "transformer": memory_estimate(sizes, dtype, in_float8=machine.linear_dtype == "float8"),
        "prompt": text,
        "cache": cache,
        "VAE": round(weights * (ENCODER + (1 - ENCODER) * decoding.itemsize / 4)),
        "its state": pixels * STATE_VALUES,
        "activations": max(_forward(setup, rows) * dtype.itemsize, pixels * while_decoding),
    }


def _is_beside(device: str, generator: str) -> bool:
    """Whether a network is where the generator is, a GPU if nothing is said, however spelled."""

    def place(name: str) -> tuple[str, int]:
        found = torch.device("cuda" if name == "auto" else name)
        return found.type, found.index or 0

    return device == "auto" or place(device) == place(generator)


def _file_sizes(setup: Setup) -> tuple[int, int]:
    """Bytes of text encoder and VAE; of a setup without a folder those of the published ones."""
    if setup.folder is None:
        return TEXT_ENCODER_BYTES, VAE_BYTES
    return file_bytes(setup.folder.text_encoder), file_bytes(setup.folder.vae)


def _forward(setup: Setup, rows: int) -> int:
    """Values alive at the widest place of the largest pass."""
    sizes, layout = setup.sizes, setup.layout
    blocks = setup.levels.num if setup.kind == "rolling" else 1
    frames = setup.policy.max_frames if setup.kind == "full" else blocks * layout.block_frames
    queries = rows * frames * setup.shape.tokens_per_frame
    keys = rows * setup.policy.max_frames * setup.shape.tokens_per_frame
    hidden = HIDDEN_COPIES_FLOAT8 if setup.machine.linear_dtype == "float8" else HIDDEN_COPIES
    feed_forward = queries * (hidden * sizes.ffn_dim + TOKEN_COPIES * sizes.dim)
    return round(max(feed_forward, keys * KEY_COPIES * sizes.dim))
