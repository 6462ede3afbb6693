"""The held-out loss: a task's own loss on data that it is not trained on, without gradient.

The items and the draws are the same at every measurement, so two of them differ by the weights
alone. They do not depend on the run's seed either, with one exception: the draw of a rollout does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.data import first_prompts
from trainer.tasks import Task
from utils.datasets import Dataset, collate
from utils.draws import Draws

HELDOUT_SEED = 0
HELDOUT_UPDATE = 2**40  # more than any training makes: no draw of a training is met


class HeldOut:
    """Measures the first `heldout_videos` items of a data set, one at a time.

    So the result depends neither on `batch_size` nor, but for rounding, on the number of ranks,
    which share out the items. Each rank makes equally many passes, since a sharded network has to
    be run by all of them together.
    """

    def __init__(self, task: Task, data: Dataset) -> None:
        self.task = task
        self.data = data
        prompts = first_prompts(data, task.config.heldout_videos)
        self.items = len(prompts)
        self.size = task.heldout_size(prompts, heldout_draws(range(self.items)))

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """`heldout/loss` and the objective's own numbers, 0-d, of this rank's share.

        Weighted so that means over the ranks are means over the items.
        """
        ranks, items = self.task.world.ranks, self.items
        sums: dict[str, Tensor] = {}
        with evaluating(player.module for player in self.task.players.values()):
            for first in range(0, items, ranks.world):
                self.task.look()
                number = first + ranks.rank
                weight = ranks.world / items if number < items else 0.0
                for name, value in self._item(number % items).items():
                    sums[name] = sums.get(name, 0) + weight * value.float()
        return sums

    def _item(self, number: int) -> dict[str, Tensor]:
        """The numbers of one item, 0-d."""
        batch = collate([self.data[number]])
        result = self.task.heldout_loss(batch, heldout_draws([number]), self.size)
        single = {name: value for name, value in result.metrics.items() if value.ndim == 0}
        return {f"heldout/{name}": value for name, value in {"loss": result.loss, **single}.items()}


def heldout_draws(indices: Sequence[int]) -> Draws:
    """The draws of these held-out items, the same at every measurement."""
    return Draws(HELDOUT_SEED, HELDOUT_UPDATE, tuple(indices))


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Networks without dropout meanwhile, which would also draw from PyTorch's generator."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
