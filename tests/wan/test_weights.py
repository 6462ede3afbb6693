"""What weight files hold, whatever stands around it; what no network can use is one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from scripts import export
from tests.tiny_models import write_tiny_text_encoder, write_tiny_vae
from tests.tiny_pipeline import TINY_DIT, random_dit, write_dit_folder
from utils.errors import UserError
from wan.checkpoints import load_dit, load_dit_config, read_state_dict
from wan.dit import DiTConfig
from wan.text_encoder import WanTextEncoder
from wan.vae import WanVAE

SIZES = TINY_DIT | {"in_dim": 4, "out_dim": 4, "num_layers": 1}
CONFIG = DiTConfig.from_dict(SIZES)
KEY = "blocks.0.ffn.0.bias"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(random_dit(1, in_dim=4, out_dim=4, num_layers=1).state_dict())


def is_read(path: Path, state: dict[str, Tensor]) -> bool:
    read = load_dit(CONFIG, path).state_dict()
    return read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        *("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.", "dit."),
        *("generator.model.", "generator.", "student.", "net.", "module.", "module.module."),
        "_forward_module.generator.model._orig_mod.",
    ],
)
def test_what_stands_before_the_names_is_left_out(
    prefix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """These were told "it is not a Wan2.1 transformer", in one format or in both."""
    flat = {prefix + key: value.contiguous() for key, value in state.items()}
    save_file(flat, tmp_path / "w.safetensors")
    torch.save(
        {"module": {"state_dict": flat}, "optimizer": {"state": {0: torch.ones(1)}}},
        tmp_path / "w.pt",
    )
    assert is_read(tmp_path / "w.safetensors", state)
    assert is_read(tmp_path / "w.pt", state)


def test_several_networks_that_nothing_tells_apart(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    both = {f"{name}.{key}": value for key, value in state.items() for name in ("a", "b")}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds several networks \(a, b\)"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.self_attn.q.lora_A.weight", "lora_unet_blocks_0_self_attn_q.lora_up.weight"),
        *("generator_lora.blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.lora_down.weight"),
        *("diffusion_model.head.head.diff", f"{KEY.removesuffix('bias')}diff_b"),
        *("blocks.0.self_attn.q.dora_scale", "blocks.0.ffn.0.hada_w1_a", "x.lokr_w1"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_adapters_are_named(
    name: str, beside: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Also beside whole weights, which would be played without them."""
    torch.save({name: torch.zeros(2, 2), **(state if beside else {})}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="it looks like a LoRA"):
        read_state_dict(tmp_path / "w.pt")


def test_other_models_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    for name, sentence in (
        ("vace_blocks.0.before_proj.weight", "a VACE model"),
        ("blocks.0.cross_attn.k_img.weight", "an image-to-video model"),
        ("exploration.weight", "an incomplete or extended"),
    ):
        torch.save(state | {name: torch.zeros(1)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"it looks like {sentence}"):
            load_dit(CONFIG, tmp_path / "w.pt")


# --- tensors ------------------------------------------------------------------------------------


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


UNUSABLE = {
    "is int64": Tensor.long,
    "is bool": Tensor.bool,
    "is complex64": lambda x: x.to(torch.complex64),
    "is sparse_coo": Tensor.to_sparse,
    "is qint8": quantised,
    "is on the meta device": meta,
    "fp8, scaled or not": lambda x: x.to(torch.float8_e4m3fn),
    "holds NaN or Inf": lambda x: torch.full_like(x, float("nan")),
    "NaN or Inf": lambda x: torch.full_like(x, float("-inf")),
}


@pytest.mark.parametrize("sentence", UNUSABLE)
@pytest.mark.filterwarnings("ignore")
def test_unusable_tensors_are_one_sentence(
    sentence: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Integers, complex and sparse numbers ended in tracebacks, NaN in black videos."""
    change: Callable[[Tensor], Tensor] = UNUSABLE[sentence]  # type: ignore[assignment]
    torch.save(state | {KEY: change(state[KEY])}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt .*{sentence}") as error:
        load_dit(CONFIG, tmp_path / "w.pt")
    assert KEY in str(error.value)


def test_values_too_large_for_the_type(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state | {KEY: state[KEY] * 1e9}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"in float16: values of {KEY} are too large"):
        load_dit(CONFIG, tmp_path / "w.pt", dtype=torch.float16)
    assert load_dit(CONFIG, tmp_path / "w.pt", dtype=torch.bfloat16)


def test_scales_of_fp8_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    extra = {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}
    save_file({k: v.contiguous() for k, v in (state | extra).items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"fp8 weights \(blocks\.0\.self_attn\.q\.scale_weight\)"):
        load_dit(CONFIG, tmp_path / "w.safetensors")


def test_vae_and_text_encoder_are_checked_alike(tmp_path: Path) -> None:
    """They made black videos of NaN, and tracebacks of integers."""
    write_tiny_vae(tmp_path / "vae.pth", base_dim=4)
    write_tiny_text_encoder(tmp_path)
    tokenizer, encoder = tmp_path / "google" / "umt5-xxl", "models_t5_umt5-xxl-enc-bf16.pth"
    loaders = {
        "vae.pth": ("conv1.bias", lambda path: WanVAE.from_official(path)),
        encoder: ("norm.weight", lambda path: WanTextEncoder.from_official(path, tokenizer)),
    }
    for name, (key, load) in loaders.items():
        weights = torch.load(tmp_path / name, weights_only=True)
        for bad in (weights[key] * float("nan"), weights[key].int()):
            torch.save(weights | {key: bad}, tmp_path / "bad.pth")
            with pytest.raises(UserError, match=rf"bad\.pth cannot be used: {key}"):
                load(tmp_path / "bad.pth")


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(UserError, match="is a GGUF file"):
        read_state_dict(tmp_path / "w.gguf")


# --- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide"),
        ({"num_heads": 16}, "does not divide into even parts"),
        ({"num_heads": 0}, "impossible num_heads: 0"),
        ({"dim": -48}, "impossible dim: -48"),
        ({"dim": "48"}, "impossible dim: '48'"),
        ({"num_layers": 1.5}, "impossible num_layers"),
        ({"num_layers": True}, "impossible num_layers"),
        ({"ffn_dim": None}, "impossible ffn_dim"),
        ({"freq_dim": 15}, "impossible freq_dim"),
        ({"dim": 10**12}, "impossible dim"),
        ({"eps": "small"}, "impossible eps"),
        ({"qk_norm": "yes"}, "impossible qk_norm"),
        ({"patch_size": 2}, "impossible patch_size"),
        ({"patch_size": [1, 2]}, "impossible patch_size"),
        ({"patch_size": [1, 0, 2]}, "impossible patch_size"),
        ({"in_dim": 36}, "in_dim 36 and out_dim 4"),
        ({"num_attention_heads": 2}, "attention_head_dim as whole numbers"),
    ],
)
def test_impossible_sizes(change: dict, sentence: str, tmp_path: Path) -> None:
    """They ended in tracebacks, some after minutes of reading."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | change))
    with pytest.raises(UserError, match=sentence):
        load_dit_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '"dim"', "{", "\xff", "[" * 100_000])
def test_broken_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json (is not readable|must hold a JSON object)"):
        load_dit_config(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        *("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'),
        *('{"weight_map": {"a": "../w.safetensors"}}', '{"weight_map": {"a": "w.pt"}}', "{"),
        '{"weight_map": {"a": "/etc/w.safetensors"}}',
    ],
)
def test_broken_index(index: str, tmp_path: Path) -> None:
    """An index without `weight_map` was a KeyError, and one could name files anywhere."""
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json (has no weight_map|is not|must hold)"):
        read_state_dict(tmp_path)


def test_statistics_of_a_vae_folder_are_numbers(tmp_path: Path) -> None:
    vae = WanVAE.random(base_dim=4)
    save_file(
        {k: v.contiguous() for k, v in vae.official_state_dict().items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    for wrong in ([0.0] * 16, [1.0] * 3, "1", None, [float("nan")] * 16):
        (tmp_path / "config.json").write_text(json.dumps({"latents_std": wrong}))
        with pytest.raises(UserError, match="must state latents_std as 16 numbers"):
            WanVAE.from_official(tmp_path)


# --- the diffusers layout -----------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_diffusers_layout_there_and_back(
    sharded: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Exact, for students too; diffusers loads what is written, and we what diffusers writes."""
    write_dit_folder(tmp_path / "model", SIZES, state)
    torch.save({"generator": {}, "generator_ema": state}, tmp_path / "student.pt")
    flags = ["--checkpoint_path", tmp_path / "student.pt", "--use_ema", "--model_folder"]
    flags += [tmp_path / "model", "--output_folder", tmp_path / "out"]
    assert export.main([str(flag) for flag in flags]) == 0
    assert is_read(tmp_path / "out", state)
    twin = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    twin.save_pretrained(tmp_path / "again", max_shard_size="20KB" if sharded else "1GB")
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == sharded
    assert is_read(tmp_path / "again", state)
    sizes = load_dit_config(tmp_path / "out")
    assert vars(sizes) == vars(CONFIG) | {"text_len": sizes.text_len}
