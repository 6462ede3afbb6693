"""Every published form of weights loads strictly; what does not fit says what it is."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_cases import load_json
from tests.tiny_models import write_tiny_vae
from tests.tiny_pipeline import TINY_DIT, random_dit, write_dit_folder
from utils.errors import UserError
from wan.checkpoints import (
    empty_dit,
    load_dit,
    load_dit_config,
    memory_estimate,
    networks_in,
    official_to_diffusers_names,
    read_state_dict,
)
from wan.dit import DiTConfig, WanDiT
from wan.weights import check_keys, choose_network

ROOT = Path(__file__).resolve().parents[2]
SIZES = TINY_DIT | {"in_dim": 4, "out_dim": 4}
CONFIG = DiTConfig.from_dict(SIZES)
SEEDS = {"generator": 1, "generator_ema": 2, "critic": 3}
MANIFESTS = ["manifest_wan2.1_t2v_1.3B_dit", "manifest_wan2.1_t2v_14B_dit"]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def weights(seed: int = 1) -> dict[str, Tensor]:
    return dict(random_dit(seed, in_dim=4, out_dim=4).state_dict())


def assert_is(dit: WanDiT, expected: Mapping[str, Tensor]) -> None:
    found = dit.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(p.requires_grad or p.is_meta for p in dit.parameters())
    assert not dit.training


# --- folders ------------------------------------------------------------------------------------


def test_official_folder(tmp_path: Path) -> None:
    write_dit_folder(tmp_path, SIZES, weights())
    assert load_dit_config(tmp_path) == CONFIG
    assert_is(load_dit(CONFIG, tmp_path), weights())


def test_official_config_may_leave_out_what_is_default(tmp_path: Path) -> None:
    """The published config.json has no text_dim and no patch_size."""
    sizes = {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes}))
    config = load_dit_config(tmp_path)
    assert (config.text_dim, config.patch_size, config.freq_dim) == (4096, (1, 2, 2), 256)


def write_shards(folder: Path, state: dict[str, Tensor], count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(state)
    weight_map = {}
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        part = keys[i::count]
        save_file({key: state[key].contiguous() for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def test_sharded_folder_with_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, weights())
    assert_is(load_dit(CONFIG, tmp_path), weights())


def test_index_decides_which_files_belong(tmp_path: Path) -> None:
    """A stray older file beside the shards must not be mixed in."""
    write_shards(tmp_path, weights())
    stray = {"patch_embedding.bias": torch.zeros(CONFIG.dim), "junk": torch.zeros(1)}
    save_file(stray, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_is(load_dit(CONFIG, tmp_path), weights())


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, weights())
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing; fetch the model again"):
        load_dit(CONFIG, tmp_path)


def test_diffusers_folder(tmp_path: Path) -> None:
    twin = WanTransformer3DModel(
        patch_size=CONFIG.patch_size,
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_dim,
        out_channels=CONFIG.out_dim,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    )
    twin.save_pretrained(tmp_path / "transformer")
    config = load_dit_config(tmp_path)
    for size in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim"):
        assert vars(config)[size] == vars(CONFIG)[size]
    names = official_to_diffusers_names(empty_dit(config).state_dict())
    expected = {official: twin.state_dict()[new] for official, new in names.items()}
    assert_is(load_dit(config, tmp_path), expected)


def test_key_map_is_one_to_one() -> None:
    official = list(empty_dit(CONFIG).state_dict())
    names = official_to_diffusers_names(official)
    assert list(names) != list(names.values())
    assert set(names) == set(official)
    assert len(set(names.values())) == len(official)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_dit_config(tmp_path)
    with pytest.raises(UserError, match=r"should hold one diffusion_pytorch_model.*download\.py"):
        read_state_dict(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="not readable as JSON"):
        load_dit_config(tmp_path)


# --- distilled files ----------------------------------------------------------------------------

PREFIXES = {
    "clean": "",
    "model": "model.",
    "fsdp": "_fsdp_wrapped_module.",
    "model, fsdp": "model._fsdp_wrapped_module.",
    "fsdp, model": "_fsdp_wrapped_module.model.",
    "compiled": "_orig_mod.",
    "model, compiled": "model._orig_mod.",
    "all": "_orig_mod.model._fsdp_wrapped_module._orig_mod.",
}
INSIDE = {
    "blocks bare": "",
    "blocks fsdp": "_fsdp_wrapped_module.",
    "blocks checkpointed": "_checkpoint_wrapped_module.",
    "blocks fsdp, checkpointed": "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    "blocks compiled": "_orig_mod.",
}


def wrapped(state: Mapping[str, Tensor], prefix: str, inside: str) -> dict[str, Tensor]:
    """Names as training frameworks leave them: in front, and after each block's number."""

    def rename(key: str) -> str:
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            key = f"blocks.{number}.{inside}{rest}"
        return prefix + key

    return {rename(key): value for key, value in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_every_prefix_is_stripped(prefix: str, inside: str, tmp_path: Path) -> None:
    state = weights()
    torch.save(wrapped(state, prefix, inside), tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt").keys() == state.keys()


def three_networks() -> dict[str, dict[str, Tensor]]:
    return {
        name: wrapped(weights(seed), PREFIXES["model, fsdp"], INSIDE["blocks checkpointed"])
        for name, seed in SEEDS.items()
    }


@pytest.mark.parametrize("network", SEEDS)
def test_distilled_file(network: str, tmp_path: Path) -> None:
    path = tmp_path / "distilled.pt"
    torch.save({**three_networks(), "step": 700}, path)
    assert networks_in(path) == tuple(SEEDS)
    assert_is(load_dit(CONFIG, path, network=network), weights(SEEDS[network]))


@pytest.mark.parametrize("network", SEEDS)
def test_safetensors_with_several_networks(network: str, tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    flat = {
        f"{name}.{key}": value.contiguous()
        for name, state in three_networks().items()
        for key, value in state.items()
    }
    save_file(flat, path)
    assert networks_in(path) == tuple(SEEDS)
    assert_is(load_dit(CONFIG, path, network=network), weights(SEEDS[network]))


@pytest.mark.parametrize("form", ["safetensors", "pt", "model", "state_dict"])
def test_bare_weights(form: str, tmp_path: Path) -> None:
    """One network without a name around it, flat or under `model` or `state_dict`."""
    state = wrapped(weights(), "model.", "")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "pt" else {form: state, "epoch": 3}, path)
    assert networks_in(path) == ()
    assert_is(load_dit(CONFIG, path), weights())


def test_dtype_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"generator": weights()}, path)
    dit = load_dit(CONFIG, path, dtype=torch.bfloat16)
    assert_is(dit, {key: value.bfloat16() for key, value in weights().items()})
    assert memory_estimate(CONFIG, torch.bfloat16) == sum(p.nbytes for p in dit.parameters())


# --- what does not fit --------------------------------------------------------------------------


def refused(state: Mapping[str, Tensor], tmp_path: Path, sentence: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(dict(state), path)
    with pytest.raises(UserError, match=rf"w\.pt does not fit this network: {sentence}"):
        load_dit(CONFIG, path)


def test_missing_keys(tmp_path: Path) -> None:
    state = weights()
    del state["head.head.weight"], state["blocks.1.ffn.0.bias"]
    refused(
        {f"model.{key}": value for key, value in state.items()},
        tmp_path,
        r"it looks like an incomplete.*; 2 keys missing \(blocks\.1\.ffn\.0\.bias, head\.head\.",
    )


def test_unexpected_keys(tmp_path: Path) -> None:
    """Guards against strict=False, which would take a wrong file without a word."""
    extra = {f"extra.{i}": torch.zeros(1) for i in range(5)}
    sentence = r"it looks like an .*extended.*; 5 keys unexpected \(extra\.0, extra\.1, extra\.2, …"
    refused(weights() | extra, tmp_path, sentence)


def test_teacher_of_another_size(tmp_path: Path) -> None:
    teacher = random_dit(dim=96, ffn_dim=192, num_layers=3, in_dim=4, out_dim=4).state_dict()
    sentence = r"it looks like a teacher of another size: 96 channels and 3 layers, where 48 and 2"
    refused(teacher, tmp_path, sentence)


def test_one_tensor_of_another_size(tmp_path: Path) -> None:
    state = weights()
    state["head.head.weight"] = torch.zeros(7, 48)
    refused(state, tmp_path, r".*; 1 of another size \(head\.head\.weight is 7x48, not 16x48\)")


def test_image_to_video_model(tmp_path: Path) -> None:
    extra = {"img_emb.proj.0.weight": torch.zeros(1)}
    refused(weights() | extra, tmp_path, "it looks like an image-to-video model")


def test_critic_with_a_classifier(tmp_path: Path) -> None:
    extra = {"cls_pred_branch.0.weight": torch.zeros(1)}
    refused(weights() | extra, tmp_path, "it looks like a critic with a classifier head")


def test_lora(tmp_path: Path) -> None:
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 48)}
    refused(lora, tmp_path, "it looks like a LoRA, which has to be merged")


def test_text_encoder(tmp_path: Path) -> None:
    refused({"token_embedding.weight": torch.zeros(9, 4)}, tmp_path, "it looks like a text encoder")


def test_something_else(tmp_path: Path) -> None:
    refused({"conv.weight": torch.zeros(3)}, tmp_path, r"it is not a Wan2\.1 transformer")


def test_vae(tmp_path: Path) -> None:
    write_tiny_vae(tmp_path / "Wan2.1_VAE.pth", base_dim=4)
    with pytest.raises(UserError, match="it looks like a VAE"):
        load_dit(CONFIG, tmp_path / "Wan2.1_VAE.pth")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_absent_network(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save({"generator": weights()}, path)
    else:
        save_file({f"generator.{key}": value for key, value in weights().items()}, path)
    with pytest.raises(UserError, match=rf"w\.{suffix} holds no critic, only generator$"):
        load_dit(CONFIG, path, network="critic")
    with pytest.raises(UserError, match=r"holds no generator_ema.*leave out --use_ema"):
        load_dit(CONFIG, path, network="generator_ema")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_broken_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save({"generator": weights()}, path)
    else:
        save_file(weights(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (lambda: load_dit(CONFIG, path), lambda: networks_in(path)):
        with pytest.raises(UserError, match=rf"w\.{suffix} is not a readable"):
            read()


@pytest.mark.parametrize("content", [b"a red ball\n", b"", b"\x80\x02", b"(lp0", b"}]q"])
def test_a_file_of_another_kind(content: bytes, tmp_path: Path) -> None:
    """A text file under the name of a checkpoint ended in a traceback."""
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pt is not a readable"):
        load_dit(CONFIG, path)


def test_not_a_dict(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="holds no state dict but a list"):
        load_dit(CONFIG, path)


def test_network_that_is_not_a_dict(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"generator": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"it is not a Wan2\.1 transformer.*unexpected \(generator\)"
    ):
        load_dit(CONFIG, path)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    """A checkpoint must not be able to run code."""
    path = tmp_path / "w.pt"
    torch.save({"generator": weights(), "call": Path}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_dit(CONFIG, path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt does not exist; check the path"):
        load_dit(CONFIG, tmp_path / "none.pt")


# --- the real sizes -----------------------------------------------------------------------------


def meta_tensors(keys: Mapping[str, list]) -> dict[str, Tensor]:
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in keys.items()
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", MANIFESTS)
def test_real_weights_fit(name: str) -> None:
    manifest = load_json(name)
    config = DiTConfig.from_dict(manifest["config"])
    dit = empty_dit(config)
    state = meta_tensors(manifest["keys"])
    check_keys(dit.state_dict(), state, Path(name))
    dit.load_state_dict(state, assign=True, strict=True)
    count = sum(p.numel() for p in dit.parameters())
    assert count == manifest["num_parameters"]
    assert memory_estimate(config, torch.bfloat16) == 2 * count


@pytest.mark.golden
def test_real_student_and_teacher_are_told_apart() -> None:
    student, teacher = (load_json(name) for name in MANIFESTS)
    dit = empty_dit(DiTConfig.from_dict(student["config"]))
    sizes = f"{teacher['config']['dim']} channels and {teacher['config']['num_layers']} layers"
    with pytest.raises(UserError, match=f"a teacher of another size: {sizes}"):
        check_keys(dit.state_dict(), meta_tensors(teacher["keys"]), Path("w.pt"))


@pytest.mark.golden
@pytest.mark.parametrize("network", SEEDS)
def test_real_distilled_names_fit(network: str) -> None:
    manifest = load_json("manifest_rolling_forcing_pt")
    names = {f"{network}.{key}": value for key, value in manifest[network].items()}
    state = choose_network(meta_tensors(names), "a Wan2.1 transformer", network, Path("w.pt"))
    assert len(state) == len(manifest[network])
    dit = empty_dit(DiTConfig.from_dict(load_json(MANIFESTS[0])["config"]))
    check_keys(dit.state_dict(), state, Path("w.pt"))


# --- memory -------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from wan.checkpoints import load_dit
from wan.dit import DiTConfig

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

config = DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, text_dim=64)
before = peak()
dit = load_dit(config, Path(sys.argv[1]), network="generator_ema")
for p in dit.parameters():
    p.sum()  # a memory-mapped tensor takes memory when it is read
size = sum(p.nbytes for p in dit.parameters()) // 2**20
print(peak() - before, size)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks of about 60 MB each."""
    path = tmp_path_factory.mktemp("large") / "large.pt"
    dit = empty_dit(DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, text_dim=64))
    networks = {
        name: {f"model.{key}": torch.full(p.shape, 0.01) for key, p in dit.state_dict().items()}
        for name in SEEDS
    }
    torch.save(networks, path)
    assert path.stat().st_size > 170 * 2**20
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_only_the_chosen_network_is_read(large_file: Path) -> None:
    """Guards against reading the whole file, or holding a network twice.

    Also against building the empty network in a way that makes torch import what is not needed.
    """
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    growth, size = (float(word) for word in measured.stdout.split())
    assert size > 55
    assert growth <= size + 40
