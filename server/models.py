"""The model of a server: opened and warm, what the page shows of it, how many sessions fit."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import VideoPipeline
from pipeline.memory import fitted, memory_in_words
from pipeline.random_weights import random_pipeline, read_preset
from pipeline.setup import Setup
from pipeline.teamwork import Teamwork
from pipeline.text import TextSource, encoder_bytes, encoder_dtype
from pipeline.text_to_video import load_generator
from server.engine import PipelineEngine
from utils.config import Config
from utils.devices import choose_device, choose_dtype, free_bytes
from utils.errors import UserError
from wan.checkpoints import networks_in
from wan.dit import DiTConfig
from wan.folders import ModelFolder, file_bytes, find_checkpoint

logger = logging.getLogger(__name__)

COMPOSER = "composer.json"  # in a model folder: sentences that the model understands
SHARE_OF_MEMORY = 0.7  # of what is free, for sessions
MOST_SESSIONS = 16
TEXT_SHARE = 0.25  # of a GPU's free memory that a text encoder may stay in
WARM_UP_PROMPT = "warm-up"


def open_model(
    config: Config, checkpoint: str | None, *, use_ema: bool, teamwork: Teamwork | None = None
) -> VideoPipeline:
    """The pipeline of an experiment file.

    `use_ema`: the average where the checkpoint has one. UserError as `load_pipeline`.
    """
    if use_ema and checkpoint is not None:
        networks = networks_in(find_checkpoint(checkpoint))
        use_ema = "generator_ema" in networks
        if networks and not use_ema:
            logger.warning("%s has no generator_ema: its generator is used", checkpoint)
    device = choose_device(config.device)
    if config.text_encoder_device == "auto" and device.type == "cuda":
        folder = ModelFolder.find(config.model_root, config.generator_name)
        dtype = encoder_dtype(choose_dtype(config.dtype, device))
        needed = encoder_bytes(file_bytes(folder.text_encoder), dtype)
        if needed > TEXT_SHARE * free_bytes(device):
            logger.info("the text encoder stays on the CPU; text_encoder_device=cuda moves it")
            config = replace(config, text_encoder_device="cpu")
    setup, use_ema = fitted(Setup.of(config)), use_ema and checkpoint is not None
    with memory_in_words(setup):
        return load_generator(setup, checkpoint, use_ema=use_ema, teamwork=teamwork)


def open_random_model(
    config: Config, preset: Path, *, teamwork: Teamwork | None = None
) -> VideoPipeline:
    """A pipeline with random weights of the sizes in `preset`; every prompt is noise to it."""
    sizes = read_preset(preset)
    setup = Setup.of(config, sizes=DiTConfig.from_dict(sizes, source=preset))
    text = RandomText(setup, choose_device(setup.machine.device))
    return random_pipeline(setup, sizes["vae"]["base_dim"], text=text, teamwork=teamwork)


class RandomText(TextSource):
    """Embeddings that are drawn, for each prompt its own."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        sizes = setup.sizes
        super().__init__(setup, text_len=sizes.text_len, dtype=torch.float32, device=device)
        self._size = (1, sizes.text_len, sizes.text_dim)
        self._to = device

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """See `TextSource`."""
        return torch.cat([self._drawn(prompt) for prompt in prompts]).to(self._to)

    def _drawn(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        return torch.randn(self._size, generator=torch.Generator().manual_seed(seed))


def warm_up(engine: PipelineEngine) -> int:
    """Run everything once, so that the first viewer waits for nothing; bytes of that session."""
    with memory_in_words(engine.setup):
        session = engine.start(WARM_UP_PROMPT, 0, None, engine.encode(WARM_UP_PROMPT))
        try:
            session.step()
            return session.stream_bytes
        finally:
            session.close()


def places(session_bytes: int, step_bytes: int, device: torch.device) -> int:
    """How many sessions of this size the free memory holds beside one step, since steps take turns.

    On the CPU a session also keeps its branch points, which the share leaves room for.
    """
    room = SHARE_OF_MEMORY * free_bytes(device) - step_bytes
    return max(1, min(MOST_SESSIONS, int(room / session_bytes)))


def read_composer(setup: Setup) -> Mapping[str, Any] | None:
    """The sentences that a model understands, if its folder says so.

    `{"template": "A {size} {shape}.", "words": {"size": ["small", …], …}}`
    """
    path = None if setup.folder is None else setup.folder.path / COMPOSER
    if path is None or not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON; fetch it again") from error
    if not isinstance(value, dict) or not {"template", "words"} <= value.keys():
        raise UserError(f"{path} must have a template and its words; fetch it again")
    return value
