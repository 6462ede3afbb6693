"""Tasks: which networks are trained in which order, and how a batch becomes a loss."""

from trainer.tasks.base import Task
from trainer.tasks.distillation import Distillation
from trainer.tasks.flow_matching import FlowMatching
from trainer.tasks.ode_initialisation import OdeInitialisation
from trainer.tasks.text_encoder import TextEncoderTraining
from trainer.tasks.vae import VaeTraining

TASKS: dict[str, type[Task]] = {
    "text_encoder": TextEncoderTraining,
    "vae": VaeTraining,
    "score_distillation": Distillation,
    "ode": OdeInitialisation,
    "diffusion": FlowMatching,
}
