"""What can be fetched, and where it goes: the table of `scripts/download.py`."""

from dataclasses import dataclass
from pathlib import Path

from utils.families import FAMILIES

WAN_FILES = (
    "config.json",
    "diffusion_pytorch_model*",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1_VAE.pth",
    "google/umt5-xxl/*",
)


@dataclass(frozen=True)
class Download:
    """Files of one hub repository, and where they go.

    `files` are names or patterns in the repository; each file keeps its path below `folder`.
    `size` is what the hub's page shows, "" where that is not known to us: what counts is the
    size in bytes that the hub states at the time of the download.
    """

    repo_id: str
    files: tuple[str, ...]
    folder: str
    licence: str
    purpose: str
    size: str = ""
    repo_type: str = "model"


DOWNLOADS = {
    "wan2.1-1.3b": Download(
        "Wan-AI/Wan2.1-T2V-1.3B",
        WAN_FILES,
        "wan_models/Wan2.1-T2V-1.3B",
        "Apache-2.0",
        "student and critic start here; text encoder, VAE",
        "17.6 GB",
    ),
    "wan2.1-14b": Download(
        "Wan-AI/Wan2.1-T2V-14B",
        WAN_FILES,
        "wan_models/Wan2.1-T2V-14B",
        "Apache-2.0",
        "teacher of DMD training",
    ),
    **{
        name: Download(known.repo_id, (known.file,), known.folder, known.licence, known.purpose)
        for name, known in FAMILIES.items()
    },
    "ode-init": Download(
        "gdhe17/Self-Forcing",
        ("checkpoints/ode_init.pt",),
        ".",
        "Apache-2.0 (model card)",
        "ODE-initialised student, where DMD training starts",
        "5.68 GB",
    ),
    "vidprom-prompts": Download(
        "gdhe17/Self-Forcing",
        ("vidprom_filtered_extended.txt",),
        "prompts",
        "made from VidProM, CC BY-NC 4.0",
        "training prompts",
        "146 MB",
    ),
    "moviegen-prompts": Download(
        "multimodalart/self-forcing",
        ("prompts/MovieGenVideoBench.txt", "prompts/MovieGenVideoBench_extended.txt"),
        ".",
        "see source (Movie Gen Bench)",
        "1003 evaluation prompts, short and extended",
        "765 kB",
        repo_type="space",
    ),
}


def how_to_get(path: str | Path, root: Path) -> str:
    """How to come by a file or a model folder that is missing: "fetch it with …".

    `root`: the project's, beside the working directory the place that files are looked for in.
    """
    wanted = Path(path).absolute().resolve()
    for name, download in DOWNLOADS.items():
        for base in (Path.cwd(), root):
            folder = (base / download.folder).resolve()
            own = download.files == WAN_FILES and wanted.is_relative_to(folder)
            if own or wanted in [folder / file for file in download.files if "*" not in file]:
                return f"fetch it with `python scripts/download.py {name}`"
    return "check the path"
