"""Weights come to the ranks: read once on every node, never whole in a rank's own memory."""

import ctypes
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.setup import Setup
from pipeline.text import TextSource
from tests.ranks import on_ranks
from tests.tiny_training import TrainingWorld
from trainer.networks import build_text
from trainer.sharding import World, agreed, full_tensor, load_full_state, make_mesh, shard_module
from trainer.trainer import Trainer
from utils.config import Config
from utils.errors import UserError
from wan.weights import StateDict, read_tensors

LAYERS, SIDE = 16, 1024  # of a network of 64 MiB in fp32
LARGEST, WHOLE = SIDE * SIDE * 4, LAYERS * SIDE * SIDE * 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_file(
        {f"{layer}.weight": torch.randn(SIDE, SIDE, generator=draw) for layer in range(LAYERS)},
        path,
    )
    return path


def load_layers(
    world: World, path: Path, dtype: torch.dtype, strategy: str
) -> tuple[nn.Module, StateDict]:
    """The sharded network, and what it was loaded from."""
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    network.to(dtype)
    shard_module(network, list(network), make_mesh(strategy, world, None), None)
    with agreed():
        weights = read_tensors(path)
    load_full_state(network, weights, path, world)
    return network, weights


def memory(pattern: str, table: str = "status") -> int:
    """Bytes of this process, summed over the lines of a table of the kernel that match."""
    text = Path(f"/proc/self/{table}").read_text(encoding="utf-8")
    return 1024 * sum(int(number) for number in re.findall(pattern, text, re.DOTALL))


def watch_a_loading(
    world: World, path: Path, dtype: torch.dtype, strategy: str
) -> tuple[int, int, bool]:
    """Bytes of the file that this rank read, of its own memory, and whether all came as it was."""
    held, broadcast = [], dist.broadcast

    def watched(*arguments: Any, **options: Any) -> None:
        broadcast(*arguments, **options)
        held.append(memory(r"RssAnon:\s+(\d+)"))

    dist.broadcast = watched
    ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back to the system
    start = memory(r"RssAnon:\s+(\d+)")
    network, weights = load_layers(world, path, dtype, strategy)
    read = memory(rf"{path}\n(?:(?!Rss:).)*Rss:\s+(\d+)", "smaps")
    found = {name: full_tensor(value) for name, value in network.state_dict().items()}
    same = all(torch.equal(value, weights[name].to(dtype)) for name, value in found.items())
    return read, max(held) - start, same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "shards", "dtype"), [("full", 4, torch.bfloat16), ("hybrid", 2, torch.float32)]
)
def test_a_node_reads_a_file_once_and_no_rank_holds_a_network(
    strategy: str, shards: int, dtype: torch.dtype, file: Path
) -> None:
    """Every rank read every file, so 64 ranks read 3.6 TB of a 57 GB teacher."""
    work = partial(watch_a_loading, path=file, dtype=dtype, strategy=strategy)
    ranks = on_ranks(4, work, nodes=2)
    assert all(same for _, _, same in ranks)
    reads = [read for read, _, _ in ranks]
    for node in (reads[:2], reads[2:]):
        assert WHOLE <= sum(node) < 1.2 * WHOLE
        assert max(node) < 0.6 * WHOLE
    size = dtype.itemsize / 4
    for _, peak, _ in ranks:
        assert peak < size * (WHOLE / shards + 2 * LARGEST) + 6 * 2**20


def load_one_of(world: World, paths: tuple[Path, Path]) -> None:
    """Two ranks of four read one file, two the other one."""
    load_layers(world, paths[world.ranks.rank // 2], torch.float32, "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda weights: weights.pop("3.weight"), "missing"),
        (lambda weights: weights["5.weight"].fill_(float("nan")), "NaN"),
        (None, "does not exist"),
    ],
)
def test_what_one_node_cannot_read_ends_all_ranks_with_one_sentence(
    broken: Callable[[dict[str, Tensor]], Any] | None, sentence: str, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    if broken is not None:
        weights = {name: value.clone() for name, value in read_tensors(file).items()}
        broken(weights)
        save_file(weights, other)

    ended = on_ranks(4, partial(load_one_of, paths=(file, other)), nodes=2)
    (said,) = [error for error in ended if isinstance(error, UserError)]
    assert sentence in str(said)
    assert [error.code for error in ended if isinstance(error, SystemExit)] == [2, 2, 2]


def open_training(world: World, configs: list[Config], folder: Path) -> None:
    """Each rank with a config of its own."""
    Trainer(configs[world.ranks.rank], world, folder, visualise=False, save=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    ["Teacher/config.json", "Teacher/diffusion_pytorch_model.safetensors", "Student", "prompts"],
)
def test_a_training_whose_files_are_on_one_node_only_ends_on_both(
    missing: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The others waited for an hour for the ranks that had ended."""
    whole = training_world.config(tmp_path / "whole")
    parts = tmp_path / "parts"
    parts.mkdir()
    for folder in training_world.models.iterdir():
        (parts / folder.name).mkdir()
        for path in folder.iterdir():
            if missing not in (folder.name, f"{folder.name}/{path.name}"):
                (parts / folder.name / path.name).symlink_to(path)
    changes = {"data_path": str(parts / "none.txt")} if missing == "prompts" else {}
    part = training_world.config(tmp_path / "part", model_root=str(parts), **changes)
    work = partial(open_training, configs=[whole, part], folder=tmp_path / "run")
    ended = on_ranks(2, work, nodes=2)
    assert isinstance(ended[0], SystemExit), ended
    assert isinstance(ended[1], UserError), ended


def encode_with_less_on_the_first(world: World, config: Config, prompts: list[str]) -> Tensor:
    """Encodings of the first prompt on the main rank, of all of them on another one."""
    text = build_text(config, Setup.of(config), world)
    table = text.encoder().model.shared.weight
    assert table.to_local().shape[0] < table.shape[0]
    own = text(prompts[:1] if world.is_main else prompts)
    text.negative()
    return own.cpu()


def test_ranks_with_unequal_numbers_of_prompts_encode_together(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """A pass for every prompt: the rank with two of three videos waited for the other for ever."""
    config = training_world.config(tmp_path, text_embeddings=None, sharding_strategy="full")
    prompts = ["a red ball", "a blue cat", "grass"]
    alone = TextSource(
        Setup.of(config), text_len=8, dtype=torch.float32, device=torch.device("cpu")
    )
    expected = alone(prompts)
    work = partial(encode_with_less_on_the_first, config=config, prompts=prompts)
    first, second = on_ranks(2, work)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(first[0], alone(prompts[:1])[0])
