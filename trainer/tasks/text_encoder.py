"""The task of `shapes/captions.py`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.result import LossResult
from shapes.captions import caption_loss
from shapes.world import token_classes, token_labels
from trainer.data import BatchPlan, check_auxiliary_data
from trainer.export import export_text_encoder
from trainer.metrics import Timer
from trainer.networks import build_caption_reader, build_text_encoder, make_player
from trainer.sharding import World
from trainer.tasks.base import Batch, Task
from utils.config import Config
from utils.datasets import Dataset
from utils.draws import Draws
from wan.text_encoder import TokenBatch, clean_prompt


class TextEncoderTraining(Task):
    """A umt5 encoder whose tokens know their subject, where no pretrained one fits (shapes)."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        super().__init__(config, world, plan, timer, data)
        check_auxiliary_data(config, data)
        self.encoder = build_text_encoder(config, world)
        self.reader = build_caption_reader(config, world, self.encoder, token_classes())
        self.players = {"text": make_player(config, "text", self.reader)}

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        tokens = self._tokens(batch["prompt"])
        labels = self._labels(batch["prompt"], tokens.ids.shape[1])
        return caption_loss(self.reader, tokens.ids, tokens.mask, labels)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`; without the worst attribute, which is no mean over captions."""
        result = self.loss(self.heldout_phase, batch, draws)
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

    def flops(self, phase: str, draws: Draws) -> None:
        """See `Task`."""

    def export(self, folder: Path) -> None:
        """See `Task`."""
        export_text_encoder(folder, self.players["text"], is_main=self.world.is_main)
