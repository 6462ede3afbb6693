"""Weights of a run in the published forms, for inference and for others.

They are copied while the training waits, and written behind its back.
"""

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from model.lora import merge_lora
from model.vae import Autoencoder
from trainer.networks import Player
from trainer.sharding import World, full_tensor
from utils.config import Config
from utils.datasets import Dataset
from utils.errors import UserError
from utils.files import write_tensors, write_torch, written_folder
from utils.processes import EXPORT_PREFIX, export_folder
from utils.video import to_float
from wan.vae import WanVAE, encode_moments

STATISTICS_CLIPS = 64
_NAME = re.compile(rf"{EXPORT_PREFIX}([0-9]{{6,}})")

logger = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Fills a folder with weights that it holds, on the CPU; runs beside the training."""


class Exports:
    """The folders of exported weights of one run, written in the background, one at a time.

    A folder has its name when it is whole. One that cannot be written does not end the training,
    which has its states: it is told, and `close` raises what befell the last one.
    """

    def __init__(self, logdir: Path, *, keep: int | None) -> None:
        self.logdir = logdir
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "export")
        self._writing: Future[None] | None = None
        self._failure: UserError | None = None  # of the last one

    def holds(self, step: int) -> bool:
        """Whether the weights of a step are there."""
        return export_folder(self.logdir, step).is_dir()

    def forget(self, step: int) -> None:
        """Remove weights of a step from a course that was gone back on: `holds` would mean them."""
        shutil.rmtree(export_folder(self.logdir, step), ignore_errors=True)

    def start(self, step: int, write: Writer) -> None:
        """Write the weights of a step. `wait` has to come before they are copied."""
        assert self._writing is None, "an export at a time: their copies fill the host's memory"
        self._writing = self._thread.submit(self._write, export_folder(self.logdir, step), write)

    def is_writing(self, seconds: float) -> bool:
        """Whether a folder is in the making, also after so long a wait for it."""
        return self._writing is not None and not wait([self._writing], seconds).done

    def wait(self) -> None:
        """Until the folder in the making has its name, or could not be written, which is told."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        self._failure = None
        try:
            writing.result()
        except UserError as error:
            self._failure = error
            logger.warning("weights were not exported, the training goes on: %s", error)

    def close(self) -> None:
        """Wait for the last one.

        Raises:
            UserError: it could not be written.
        """
        self.wait()
        self._thread.shutdown()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise UserError(
                f"the last weights were not exported: {failure}; the same command writes them"
            )

    def _write(self, folder: Path, write: Writer) -> None:
        with written_folder(folder) as part:
            write(part)
        if self.keep is not None:  # later ones are of a course that was gone back on
            folders = exported(self.logdir)
            for old in folders[: folders.index(folder) + 1][: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def exported(logdir: Path) -> list[Path]:
    """A run's folders of exported weights, oldest first; those that a person renamed are none."""
    steps = sorted(
        int(name[1])
        for path in (logdir.iterdir() if logdir.is_dir() else ())
        if (name := _NAME.fullmatch(path.name))
    )
    folders = dict.fromkeys(export_folder(logdir, step) for step in steps)
    return [folder for folder in folders if folder.is_dir()]


def export_generator(config: Config, player: Player, *, is_main: bool) -> Writer | None:
    """What writes a student's weights, on the main rank; all ranks have to call it.

    `model.pt` holds `generator` and, once there is one, `generator_ema`, with names as published;
    with `export_safetensors`, `generator.safetensors` and `generator_ema.safetensors` hold the
    official names.
    """
    networks = {
        network: gathered(weights, is_main=is_main)
        for network, weights in weights_of(player).items()
    }

    def write(folder: Path) -> None:
        merged = {network: _merged(state, config) for network, state in networks.items()}
        published = {
            network: {f"model.{name}": value for name, value in state.items()}
            for network, state in merged.items()
        }
        write_torch(folder / "model.pt", published)
        if config.export_safetensors:
            for network, state in merged.items():
                write_tensors(folder / f"{network}.safetensors", state)

    return write if is_main else None


def export_vae(
    player: Player, data: Dataset, world: World, look: Callable[[], None]
) -> Writer | None:
    """What writes `Wan2.1_VAE.pth`: the average if there is one, its latents standard normal.

    By their mean and standard deviation over the first clips of `data`, which the main rank
    encodes. All ranks call `look` behind each clip, so that nobody is taken for lost; what it
    raises ends the export.
    """
    weights = list(weights_of(player).values())[-1]
    state = gathered(weights, is_main=world.is_main)
    vae = None
    if world.is_main:
        model = cast(Autoencoder, player.module).model
        vae = WanVAE.like(model, {k.removeprefix("model."): v for k, v in state.items()})
        vae.to(world.device)
    means: list[Tensor] = []
    for index in range(min(STATISTICS_CLIPS, len(data))):
        if vae is not None:
            means.append(_latent_means(vae, data[index]["video"]))
        look()
    if vae is None:
        return None
    together = torch.cat(means, dim=1).float()
    vae.fold_statistics(together.mean(dim=1), together.std(dim=1))
    save = vae.to("cpu").save_official
    return lambda folder: save(folder / "Wan2.1_VAE.pth")


@torch.no_grad()
def _latent_means(vae: WanVAE, video: Tensor) -> Tensor:
    """Means `[C, n]` of the latents of a clip, uint8 `[n, H, W, 3]`."""
    pixels = to_float(video)[None].to(vae.device, vae.dtype)
    return encode_moments(vae.model, pixels)[0].movedim(2, 0).flatten(1)


def weights_of(player: Player) -> dict[str, dict[str, Tensor]]:
    """`generator` and, once there is an average, `generator_ema`: (sharded) tensors by name."""
    weights = cast(dict[str, Tensor], get_model_state_dict(player.module))
    if player.ema is None:
        return {"generator": weights}
    return {"generator": weights, "generator_ema": {**weights, **player.ema.shadow}}


def gathered(state: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Whole tensors on the main rank's CPU; empty on the others, which have to take part."""
    whole: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = full_tensor(value.detach())
        if is_main:
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            whole[name] = copied.copy_(tensor)  # which training does not change
    return whole


def _merged(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    if config.lora is None:
        return state
    return merge_lora(state, config.lora.rank, config.lora.alpha)
