"""True clips in the windows of rollouts: in one parallel pass a student sees what it will see."""

from dataclasses import replace

import torch
from torch import Tensor

from model.self_rollout import output_windows
from pipeline.setup import Setup
from trainer.tasks.base import rollout_recipe
from utils.config import Config
from utils.draws import Draws
from wan.context import ForcedContext
from wan.dit import DiTConfig
from wan.flops import pass_attention_flops, pass_flops


class WindowForcing:
    """Levels and attention of clips of `frames` latent frames, drawn as DMD draws its rollouts.

    UserError if the frames are no whole blocks.
    """

    def __init__(
        self, config: Config, setup: Setup, sizes: DiTConfig, device: torch.device, frames: int
    ) -> None:
        self.config, self.setup, self.sizes = config, setup, sizes
        self.device, self.frames = device, frames
        self.contexts: dict[tuple[range, ...], ForcedContext] = {}
        setup.layout.require_full_blocks(frames)

    def draw(self, draws: Draws) -> tuple[Tensor, ForcedContext]:
        """Levels `[F]` and attention of the output windows of one rollout."""
        layout = self.setup.layout
        recipe = rollout_recipe(self.config)
        recipe = replace(recipe, longest=self.frames, seed=draws.seed, true_prefix_probability=0.0)
        drawn = recipe.draw(layout, draws.update)
        windows = output_windows(self.setup, drawn)
        blocks = [pair for window in windows for pair in window]
        per_frame = [level for block, level in blocks for _ in range(layout.frames(block))]
        spans = tuple(
            range(layout.start(window.blocks[0]), layout.start(window.blocks[-1] + 1))
            for window in windows
        )
        if spans not in self.contexts:
            self.contexts[spans] = ForcedContext(
                self.setup.policy,
                [range(layout.start(b), layout.start(b + 1)) for b in range(drawn.num_blocks)],
                spans,
                self.setup.shape.grid,
                self.sizes.head_dim,
                self.device,
            )
        return torch.tensor(per_frame), self.contexts[spans]

    def timesteps(self, draws: Draws) -> tuple[Tensor, ForcedContext]:
        """The same as timesteps of a batch `[B, F]`."""
        levels, context = self.draw(draws)
        return self.setup.levels.tensor()[levels].expand(len(draws.indices), -1), context

    def flops(self, draws: Draws) -> tuple[int, int]:
        """Operations of one video's forward pass, and of its attention."""
        tokens, views = self.setup.shape.tokens_per_frame, self.draw(draws)[1].views
        passes = (pass_flops(self.sizes, view, tokens) for view in views)
        attention = (pass_attention_flops(self.sizes, view, tokens) for view in views)
        return sum(passes), sum(attention)
