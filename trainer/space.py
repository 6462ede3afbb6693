"""Room on the disk for what a run will write, looked at before it is needed."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.networks import Player
from trainer.tasks.base import Task
from utils.config import Config
from utils.files import free_space, require_space

logger = logging.getLogger(__name__)

GIB = 2**30


def require_space_for(config: Config, task: Task, logdir: Path, step: int) -> None:
    """UserError unless a state and an export fit into the run's folder; warns if not all will."""
    state = sum(map(state_bytes, task.players.values()))
    export = export_bytes(config, task)
    require_space(
        logdir,
        state + export,
        f"{state / GIB:.2f} GiB of state and {export / GIB:.2f} GiB of weights are written every "
        f"{config.log_iters} steps",
    )
    if config.max_steps is None:
        return
    saves = -(-max(0, config.max_steps - step) // config.log_iters)
    kept = min(saves, config.keep_exports or saves)
    total = kept * export + min(saves, config.keep_checkpoints + 1) * state
    free, place = free_space(logdir)
    if total > free:
        fitting = max(1, int(free - (config.keep_checkpoints + 1) * state) // export - 1)
        logger.warning(
            "%d exports of %.2f GiB and the states will take %.2f GiB, and %.2f GiB are free at "
            "%s: set keep_exports=%d, or make room",
            kept,
            export / GIB,
            total / GIB,
            free / GIB,
            place,
            fitting,
        )


def state_bytes(player: Player) -> int:
    """What a state holds of a player: weights, two moments, and the average if it has one."""
    moving = 2 + (player.ema_weight is not None)
    return _bytes(player.module.state_dict()) + moving * _bytes(player.trained)


def export_bytes(config: Config, task: Task) -> int:
    """What an export holds: the first player's weights, once more averaged, in one or two forms."""
    player = next(iter(task.players.values()))
    networks = 1 + (player.ema_weight is not None)
    forms = 1 + config.export_safetensors
    return networks * forms * _bytes(player.module.state_dict())


def _bytes(tensors: Mapping[str, object]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))
