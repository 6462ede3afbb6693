"""The task of `model/vae.py`."""

from model.result import LossResult
from model.vae import vae_loss
from pipeline.setup import Setup
from trainer.data import check_videos
from trainer.export import Writer, export_vae
from trainer.networks import build_trained_vae, make_player
from trainer.tasks.base import Batch, Task, TaskInputs
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import Draws, Purpose


class VaeTraining(Task):
    """Reconstruction and KL of a causal video VAE; its statistics are folded in at export."""

    def __init__(self, given: TaskInputs) -> None:
        config, setup, world = given.config, given.setup, given.world
        super().__init__(given)
        self.autoencoder = build_trained_vae(config, setup, world)
        self.players = {"vae": make_player(config, "vae", self.autoencoder, ema=True)}

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`."""
        check_videos(config, data)

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        video = self._video(batch)
        latent = self.autoencoder.latent_shape(video)
        noise = to_device(draws.normal(Purpose.NOISE, latent), self.world.device)
        with self.timer.phase("forward"):
            return vae_loss(
                self.autoencoder,
                video,
                noise,
                kl_weight=self.config.vae.kl_weight,
                l1_weight=self.config.vae.l1_weight,
                edge_weight=self.config.vae.edge_weight,
            )

    def phase_flops(self, player: str, draws: Draws) -> None:
        """See `Task`."""

    def export(self) -> Writer | None:
        """See `Task`."""
        return export_vae(self.players["vae"], self.data, self.world, self.look)
