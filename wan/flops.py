"""Floating-point operations of the network, from its sizes alone; multiply and add count as two.

What is counted is every matrix product and attention, as `torch.utils.flop_counter` does; norms,
activations and rotations are left out, and so is the average of a sink (`sink_ema`): less than a
ten-thousandth. The text MLP and the text's keys and values are made once per prompt (`text_flops`),
so no pass has them.
"""

from wan.dit import DiTConfig
from wan.kv_cache import View


def blocks_flops(config: DiTConfig, queries: int, keys: int) -> int:
    """All transformer blocks for one video: `queries` tokens that attend to `keys` tokens.

    Per layer: q, k, v, o of self-attention and q, o of cross-attention, the two layers of the
    feed-forward, then the scores and sums of both attentions.
    """
    linear = 2 * queries * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    return config.num_layers * linear + attention_flops(config, queries, keys)


def attention_flops(config: DiTConfig, queries: int, keys: int) -> int:
    """Of these, the scores and sums: of all layers, to `keys` tokens and to the text."""
    return config.num_layers * 4 * queries * (keys + config.text_len) * config.dim


def edge_flops(config: DiTConfig, frames: int, tokens_per_frame: int) -> int:
    """The rest of a forward pass: patch embedding, time MLP and projection, head."""
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    tokens = frames * tokens_per_frame
    patches = 2 * tokens * config.dim * patch * (config.in_dim + config.out_dim)
    time = 2 * frames * config.dim * (config.freq_dim + config.dim + 6 * config.dim)
    return patches + time


def forward_flops(config: DiTConfig, frames: int, keys: int, tokens_per_frame: int) -> int:
    """One forward pass for one video: `frames` latent frames that attend to `keys` frames."""
    queries = frames * tokens_per_frame
    return blocks_flops(config, queries, keys * tokens_per_frame) + edge_flops(
        config, frames, tokens_per_frame
    )


def pass_flops(config: DiTConfig, view: View, tokens_per_frame: int) -> int:
    """A window pass or a clean pass with this view of the past (`ContextPolicy.view`)."""
    frames = len(view.positions) - len(view.frames)
    linear = forward_flops(config, frames, 0, tokens_per_frame)
    seen = attention_flops(config, frames * tokens_per_frame, 0)
    return linear - seen + pass_attention_flops(config, view, tokens_per_frame)


def pass_attention_flops(config: DiTConfig, view: View, tokens_per_frame: int) -> int:
    """Of these, the scores and sums; each block of a causal window sees a part of the keys."""
    seen, total = len(view.frames), 0
    for frames in view.spans or (len(view.positions) - seen,):
        seen += frames
        total += attention_flops(config, frames * tokens_per_frame, seen * tokens_per_frame)
    return total


def training_flops(forward: int, *, checkpointing: bool, kept: int = 0) -> int:
    """A pass with its backward pass, which is two forwards; checkpointing runs one more.

    But for operations whose results are `kept` (with `selective_checkpointing` attention's).
    """
    return 3 * forward + (forward - kept if checkpointing else 0)


def text_flops(config: DiTConfig) -> int:
    """`WanDiT.encode_text` for one prompt: the text MLP and every layer's keys and values."""
    mlp = config.dim * (config.text_dim + config.dim)
    keys_values = config.num_layers * 2 * config.dim**2
    return 2 * config.text_len * (mlp + keys_values)
