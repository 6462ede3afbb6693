"""The text encoder against recorded numbers, and the tokenizer against its file."""

import io
import math

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tests.golden_cases import load_case, load_json
from tests.tiny_models import write_tiny_text_encoder, write_tiny_vae
from utils.errors import UserError
from wan.text_encoder import (
    WanTextEncoder,
    WanTokenizer,
    clean_prompt,
    official_umt5_key,
    umt5_config_from_shapes,
)

WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
TRICKY = [
    "",
    " ",
    "a red ball",
    "  two   spaces\tand\na line",
    "色调艳丽，过曝，静态，细节模糊不清。",
    "café, naïve, Ångström, e\u0301",
    "ﬁne ½ ①",
    "a cat 🐈 jumps 👩‍🚀 over",
    "tags </s> and <pad> inside",
    "word " * 200,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    write_tiny_text_encoder(path)
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(folder):
    return folder / "google" / "umt5-xxl"


@pytest.fixture(scope="module")
def encoder(folder, tokenizer_folder):
    return WanTextEncoder.from_official(
        folder / WEIGHTS, tokenizer_folder, dtype=torch.float32, text_len=40
    )


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    """A folder that holds nothing but a sentencepiece model with umt5's special ids."""
    path, model = tmp_path_factory.mktemp("spiece"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRICKY[2:8] * 3),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "spiece.model").write_bytes(model.getvalue())
    return path


# --- recorded numbers --------------------------------------------------------------------------


@pytest.mark.golden
def test_encoder_gives_recorded_embeddings(tmp_path, tokenizer_folder):
    case = load_case("umt5")
    weights = {
        key.removeprefix("weights."): value
        for key, value in case.tensors.items()
        if key.startswith("weights.")
    }
    torch.save(weights, tmp_path / WEIGHTS)
    encoder = WanTextEncoder.from_official(
        tmp_path / WEIGHTS, tokenizer_folder, dtype=torch.float32
    )
    ids, mask = case.tensors["ids"], case.tensors["mask"]
    with torch.no_grad():
        raw = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(raw, case.tensors["context_raw"], atol=1e-4, rtol=0)
    embeddings = encoder.encode_ids(ids, mask)
    torch.testing.assert_close(embeddings, case.tensors["prompt_embeds"], atol=1e-4, rtol=0)

    config, recorded = encoder.model.config, case.meta["config"]
    assert encoder.dim == recorded["dim"]
    assert config.num_heads * config.d_kv == recorded["dim_attn"]
    assert config.num_layers == recorded["encoder_layers"]
    assert config.relative_attention_num_buckets == recorded["num_buckets"]
    assert encoder.official_state_dict().keys() == weights.keys()


@pytest.mark.golden
def test_key_names_are_those_of_the_real_checkpoint():
    manifest = load_json("manifest_umt5_xxl_encoder")
    shapes = {key: shape for key, (shape, _) in manifest["keys"].items()}
    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config_from_shapes(shapes))
    own = {official_umt5_key(k): list(v.shape) for k, v in model.state_dict().items()}
    assert own == shapes
    assert sum(map(math.prod, own.values())) == manifest["num_parameters"]


# --- prompts and ids ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \n\t cat ", "a cat"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("schÃ¶n", "schön"),
        ("，", ","),
        ("", ""),
    ],
)
def test_clean_prompt(text, cleaned):
    assert clean_prompt(text) == cleaned


@pytest.mark.parametrize("text", TRICKY)
def test_ids_are_those_of_the_tokenizer_file(tokenizer_folder, text):
    """Rebuilding the tokenizer from its class drops NFKC and byte fallback, and changes ids."""
    length = 64
    ours = WanTokenizer.from_folder(tokenizer_folder)([text], length)
    file = tokenizer_folder / "tokenizer.json"

    ids = Tokenizer.from_file(str(file)).encode(text).ids  # ends with </s>
    if len(ids) > length:
        ids = [*ids[: length - 1], ids[-1]]
    assert ours.ids[0, : len(ids)].tolist() == ids
    assert ours.mask.sum() == len(ids)

    fast = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>")
    theirs = fast([text], max_length=length, padding="max_length", truncation=True)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.mask.tolist() == theirs["attention_mask"]


def test_special_ids_are_umt5s(tokenizer_folder, spiece_folder):
    for folder in (tokenizer_folder, spiece_folder):
        tokenizer = WanTokenizer.from_folder(folder)
        assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_truncation_keeps_the_end_mark_last(tokenizer_folder):
    batch = WanTokenizer.from_folder(tokenizer_folder)(["red " * 50, "red"], 10)
    assert batch.ids.dtype == batch.mask.dtype == torch.int64
    assert batch.ids[0, -1] == 1
    assert (batch.ids[1] == 1).nonzero().flatten().tolist() == [batch.mask[1].sum() - 1]
    assert (batch.ids[1][batch.mask[1] == 0] == 0).all()


def test_stored_truncation_and_padding_settings_are_ignored(tokenizer_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, plain = (WanTokenizer.from_folder(f) for f in (tmp_path, tokenizer_folder))
    assert torch.equal(ours(TRICKY, 30).ids, plain(TRICKY, 30).ids)


def test_folder_with_sentencepiece_only(spiece_folder):
    processor = SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    batch = WanTokenizer.from_folder(spiece_folder)(TRICKY[:-1], 256)
    for text, ids, mask in zip(TRICKY[:-1], batch.ids, batch.mask, strict=True):
        assert ids[mask == 1].tolist() == [*processor.encode(text), 1]


def test_folder_without_tokenizer_or_with_a_broken_one(tmp_path):
    with pytest.raises(UserError, match="neither"):
        WanTokenizer.from_folder(tmp_path)
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=name):
            WanTokenizer.from_folder(tmp_path)


# --- embeddings --------------------------------------------------------------------------------


def test_embeddings_are_zero_after_the_last_token(encoder):
    prompts = ["a red ball moves left", "the cat", ""]
    embeddings = encoder.encode(prompts)
    mask = encoder.tokenizer(prompts, encoder.text_len).mask.bool()
    assert embeddings.shape == (3, encoder.text_len, encoder.dim)
    assert (embeddings[~mask] == 0).all()
    assert (embeddings[mask].abs().sum(-1) > 0).all()
    assert not embeddings.requires_grad


def test_a_prompt_does_not_depend_on_its_batch_or_padding(encoder):
    alone = encoder.encode(["a red ball"])
    together = encoder.encode(["a red ball", "the cat jumps over the moon " * 5])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    tokens = encoder.tokenizer(["a red ball"], 12)
    short = encoder.encode_ids(tokens.ids, tokens.mask)
    torch.testing.assert_close(alone[:, :12], short, atol=1e-5, rtol=0)


def test_prompts_are_cleaned(encoder):
    assert torch.equal(encoder.encode([" a  red&amp;blue "]), encoder.encode(["a red&blue"]))


def test_bfloat16_is_the_default_and_runs_on_the_cpu(folder, tokenizer_folder, encoder):
    half = WanTextEncoder.from_official(folder / WEIGHTS, tokenizer_folder, text_len=40)
    embeddings = half.encode(["a red ball"])
    assert embeddings.dtype == half.dtype == torch.bfloat16
    assert (embeddings.float() - encoder.encode(["a red ball"])).abs().mean() < 0.02


def test_closed_encoder_lets_go_of_its_weights(folder, tokenizer_folder):
    encoder = WanTextEncoder.from_official(folder / WEIGHTS, tokenizer_folder)
    encoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        encoder.encode(["a"])


# --- files -------------------------------------------------------------------------------------


def test_save_official_then_load_is_exact(folder, tokenizer_folder, tmp_path):
    encoder = WanTextEncoder.from_official(folder / WEIGHTS, tokenizer_folder)
    encoder.save_official(tmp_path / WEIGHTS)
    first, again = (torch.load(p / WEIGHTS, weights_only=True) for p in (folder, tmp_path))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_embedding_is_held_once(encoder):
    assert encoder.model.encoder.embed_tokens is encoder.model.shared


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_transformers_folder_loads_whole_or_sharded(encoder, tokenizer_folder, tmp_path, shard):
    encoder.model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shard == "20KB")
    loaded = WanTextEncoder.from_official(
        tmp_path, tokenizer_folder, dtype=torch.float32, text_len=40
    )
    assert torch.equal(loaded.encode(["a red ball"]), encoder.encode(["a red ball"]))


def test_random_depends_on_its_seed_alone(tokenizer_folder):
    tokenizer = WanTokenizer.from_folder(tokenizer_folder)
    one, same, other = (WanTextEncoder.random(tokenizer, 400, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.encode(["a cat"]), same.encode(["a cat"]))
    assert not torch.equal(one.encode(["a cat"]), other.encode(["a cat"]))


def test_wrong_files_are_user_errors(folder, tokenizer_folder, tmp_path):
    write_tiny_vae(tmp_path / "Wan2.1_VAE.pth", base_dim=4)
    with pytest.raises(UserError, match="not a umt5 text encoder"):
        WanTextEncoder.from_official(tmp_path / "Wan2.1_VAE.pth", tokenizer_folder)
    with pytest.raises(UserError, match="does not exist"):
        WanTextEncoder.from_official(tmp_path / WEIGHTS, tokenizer_folder)
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    del weights["blocks.1.norm2.weight"]
    torch.save(weights, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"1 keys missing \(blocks\.1\.norm2\.weight"):
        WanTextEncoder.from_official(tmp_path / WEIGHTS, tokenizer_folder)


def test_a_tokenizer_of_another_model_is_refused(encoder, monkeypatch):
    """Its tokens beyond the weights ended in an IndexError of torch."""
    monkeypatch.setattr(encoder.tokenizer, "split", lambda text: [encoder.model.config.vocab_size])
    with pytest.raises(UserError, match="not of one model"):
        encoder.encode(["a cat"])


def test_embeddings_are_numbers(encoder, monkeypatch):
    """Overflow in the encoder made black videos."""
    overflow = torch.full((1, encoder.text_len, encoder.dim), float("inf"))
    monkeypatch.setattr(encoder, "encode_ids", lambda ids, mask: overflow)
    with pytest.raises(UserError, match=r"NaN or Inf in .* for the prompt 'a cat'"):
        encoder.encode(["a cat"])
