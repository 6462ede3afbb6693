"""Tasks: which networks are trained in which order, and how a batch becomes a loss."""

from trainer.tasks.base import Task
from trainer.tasks.consistency import Consistency
from trainer.tasks.distillation import Distillation
from trainer.tasks.flow_matching import FlowMatching
from trainer.tasks.ode_initialisation import OdeInitialisation
from trainer.tasks.vae import VaeTraining
from utils.packages import offered, split_name

TASKS: dict[str, type[Task]] = {
    "vae": VaeTraining,
    "score_distillation": Distillation,
    "ode": OdeInitialisation,
    "diffusion": FlowMatching,
    "consistency": Consistency,
}


def find_task(name: str) -> type[Task]:
    """The task that the key `trainer` names: one of `TASKS`, or `package:name`.

    Raises:
        UserError: the package offers no such task.
    """
    named = split_name(name)
    if named is None:
        return TASKS[name]
    package, own = named
    return offered(package, "open_task")(own)
