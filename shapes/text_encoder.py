"""The task of `shapes/captions.py`: `trainer: shapes:text_encoder`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.result import LossResult
from pipeline.setup import Setup
from shapes.captions import CaptionReader, caption_loss
from shapes.dataset import ShapesVideos
from shapes.world import token_classes, token_labels
from trainer.export import Writer, gathered, weights_of
from trainer.networks import Player, compute_dtype, make_player
from trainer.sharding import World, make_mesh, shard_module, strategy_of
from trainer.tasks.base import Batch, Task, TaskInputs
from utils.config import Config
from utils.datasets import Dataset
from utils.draws import Draws
from utils.errors import UserError
from wan.folders import TEXT_ENCODER_FILE
from wan.text_encoder import TokenBatch, WanTextEncoder, clean_prompt, official_umt5_weights
from wan.weights import save_weights


class TextEncoderTraining(Task):
    """A umt5 encoder whose tokens know their subject, where no pretrained one fits (shapes)."""

    def __init__(self, given: TaskInputs) -> None:
        config, setup, world = given.config, given.setup, given.world
        super().__init__(given)
        self.encoder = build_text_encoder(setup, world)
        self.reader = build_caption_reader(config, world, self.encoder, token_classes())
        self.players = {"text": make_player(config, "text", self.reader)}

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`."""
        if not isinstance(data, ShapesVideos):
            raise UserError("this text encoder is trained on its own captions: shapes:train")

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        tokens = self._tokens(batch["prompt"])
        labels = self._labels(batch["prompt"], tokens.ids.shape[1])
        return caption_loss(self.reader, tokens.ids, tokens.mask, labels)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`; without the worst attribute, which is no mean over captions."""
        result = self.loss(self.heldout_player, batch, draws)
        accuracy = result.metrics["caption/accuracy"]
        return LossResult(result.loss, {"caption/accuracy": accuracy})

    def _tokens(self, captions: Sequence[str]) -> TokenBatch:
        """Ids and mask `[B, L]`, L the length of the longest caption."""
        prompts = [clean_prompt(caption) for caption in captions]
        tokens = self.encoder.tokenizer(prompts, self.encoder.text_len)
        used = int(tokens.mask.sum(dim=1).max())
        device = self.world.device
        return TokenBatch(tokens.ids[:, :used].to(device), tokens.mask[:, :used].to(device))

    def _labels(self, captions: Sequence[str], length: int) -> Tensor:
        """`[B, length, attributes]`; -1: no value."""
        split = self.encoder.tokenizer.split
        labels = torch.full((len(captions), length, len(self.reader.classes)), -1)
        for row, caption in zip(labels, captions, strict=True):
            said = token_labels(clean_prompt(caption), lambda text: len(split(text)))
            cut = said[: self.encoder.text_len - 1]  # the last token marks the end
            row[: len(cut)] = torch.tensor(cut)
        return labels.to(self.world.device)

    def phase_flops(self, player: str, draws: Draws) -> None:
        """See `Task`."""

    def export(self) -> Writer | None:
        """See `Task`."""
        return export_text_encoder(self.players["text"], is_main=self.world.is_main)


def build_text_encoder(setup: Setup, world: World) -> WanTextEncoder:
    """The text encoder of the student's folder, in fp32, to be trained."""
    files = setup.require_folder()
    files.require(files.text_encoder, files.tokenizer)
    return WanTextEncoder.from_official(
        files.text_encoder,
        files.tokenizer,
        device=world.device,
        dtype=torch.float32,
        text_len=setup.sizes.text_len,
    )


def build_caption_reader(
    config: Config, world: World, encoder: WanTextEncoder, classes: Sequence[int]
) -> CaptionReader:
    """The encoder with a linear probe, sharded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        reader = CaptionReader(encoder.model, encoder.dim, classes).to(world.device)
    reader.requires_grad_(True).train()
    low = compute_dtype(config, world.device)
    if world.size > 1 or low is not None:
        mesh = make_mesh(strategy_of(config, "text_encoder"), world, config.hybrid_shard_size)
        shard_module(reader, [], mesh, low)
    return reader


def export_text_encoder(player: Player, *, is_main: bool) -> Writer | None:
    """What writes `models_t5_umt5-xxl-enc-bf16.pth`, in bf16 as the official file; no probe."""
    state = gathered(weights_of(player)["generator"], is_main=is_main)
    encoder = {
        key.removeprefix("encoder."): value.to(torch.bfloat16)
        for key, value in state.items()
        if key.startswith("encoder.")
    }

    def write(folder: Path) -> None:
        save_weights(official_umt5_weights(encoder), folder / TEXT_ENCODER_FILE)

    return write if is_main else None
