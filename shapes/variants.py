"""What the ablations compare: how each row is played, with whose weights, and against what."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

START = "causal_init"  # of every distillation
REFERENCE = "rolling_forcing"
"""The row whose training says how many operations each distillation may take."""
CORE_SEEDS = (0, 1, 2)


class Beginning(NamedTuple):
    """What videos start from: `given` blocks of true frames, or noise."""

    title: str
    given: int


BEGINNINGS = {"true": Beginning("from a true prefix", 1), "noise": Beginning("from noise", 0)}


@dataclass(frozen=True)
class Weights:
    """Weights that a training ends with: a file of configs/shapes, and changes of it.

    `start`: whose weights it goes on from; None: as its config says.
    """

    config: str
    overrides: tuple[str, ...] = ()
    start: str | None = START


@dataclass(frozen=True)
class Row:
    """Weights and the way in which they are played.

    config, overrides: how it is played, and trained, unless `weights` names another row, or one of
    `STARTS`, whose weights it plays. core: with three training seeds, and for five minutes too.
    against: the row that it is compared with.
    """

    key: str
    title: str
    why: str
    config: str
    overrides: tuple[str, ...] = ()
    weights: str | None = None
    core: bool = False
    against: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its training."""
        return CORE_SEEDS if self.core else (0,)


STARTS = {
    "ode_init": Weights("ode_init", start=None),
    START: Weights(START, start="ode_init"),
    "teacher_forcing": Weights("teacher_forcing", start=None),
    "consistency_init": Weights("consistency_init", start="teacher_forcing"),
}

ROLLING, ROLLING_BARE, BLOCK, BLOCK_BARE = CORE = (
    Row(
        REFERENCE,
        "Rolling Forcing",
        "the method: a rolling window, and a sink",
        "rolling_forcing",
        core=True,
    ),
    Row(
        "rolling_no_sink",
        "Rolling Forcing, no sink",
        "what the window does without a sink",
        "rolling_no_sink",
        core=True,
    ),
    Row(
        "self_forcing_sink",
        "Self Forcing with a sink",
        "block by block, with the same sink, which its clean passes see as well",
        "self_forcing_sink",
        core=True,
    ),
    Row(
        "self_forcing",
        "Self Forcing",
        "block by block, without a sink",
        "self_forcing",
        core=True,
    ),
)


def variation(
    key: str,
    title: str,
    why: str,
    *overrides: str,
    config: str = REFERENCE,
    against: str = REFERENCE,
) -> Row:
    """A row that is Rolling Forcing, or another row, but for one thing."""
    return Row(key, title, why, config, overrides, against=against)


def of_start(start: str, title: str, *, rolling: bool = False) -> Row:
    """A start that is played as a row with a sink is, before any distillation."""
    against = ROLLING if rolling else BLOCK
    return Row(
        f"{start}_alone_rolling" if rolling else f"{start}_alone",
        f"{title} alone, {'rolling' if rolling else 'block by block'}",
        "what distillation adds to where it starts" if start == START else "another start",
        against.config,
        weights=start,
        against=against.key,
    )


FURTHER = (
    Row(
        "infinite_forcing",
        "Infinite-Forcing (V-sink)",
        "block by block, the first frame kept right before the recent ones",
        "infinite_forcing",
        against=BLOCK.key,
    ),
    variation(
        "rolling_levels_3",
        "Rolling Forcing, three levels",
        "a shorter window: fewer levels, less latency",
        config="rolling_levels_3",
    ),
    variation(
        "rolling_block_causal",
        "Rolling Forcing, causal window",
        "blocks of a window that see the less noisy ones before them alone",
        config="rolling_block_causal",
    ),
    variation(
        "rolling_sink_ema",
        "Rolling Forcing, averaged sink",
        "a sink that follows what the video becomes",
        config="rolling_sink_ema",
    ),
    variation(
        "critic_reuse_2",
        "Rolling Forcing, rollouts used twice",
        "two updates of the critic on each of its rollouts",
        "critic_updates_per_rollout=2",
    ),
    variation(
        "critic_reuse_5",
        "Rolling Forcing, rollouts used five times",
        "the critic's updates between two of the student on one rollout, and five instead of four",
        "critic_updates_per_rollout=5",
        "dfake_gen_update_ratio=5",
    ),
    variation(
        "rollouts_63",
        "Rolling Forcing, rollouts of up to 63 frames",
        "training three times as far as the scored clip is long",
        "num_training_frames=63",
        "replayed_backward=true",
    ),
    Row(
        "sink_deep",
        "Self Forcing with a deep sink",
        "block by block, half of the attention is sink",
        "self_forcing_sink",
        ("model_kwargs.sink_size=10",),
        against=BLOCK.key,
    ),
    Row(
        "sink_unseen",
        "Self Forcing with a sink, clean passes without",
        "block by block, with the sink of Rolling Forcing, whose clean passes do not see it",
        "self_forcing_sink",
        ("clean_pass_sees_sink=false",),
        weights=BLOCK.key,
        against=BLOCK.key,
    ),
    variation(
        "noisy_context",
        "Rolling Forcing, noisy context",
        "finished frames with a little noise, so that less of their faults is copied",
        "context_noise=100",
    ),
    variation(
        "scored_anywhere",
        "Rolling Forcing, clips scored anywhere in 63 frames",
        "rollouts of up to 63 frames, of which any clip may be scored, not the last alone",
        "num_training_frames=63",
        "replayed_backward=true",
        "scored_clip=anywhere",
        against="rollouts_63",
    ),
    variation(
        "step_per_video",
        "Rolling Forcing, an exit level for each video",
        "more of the schedule in each update",
        "same_step_across_videos=false",
    ),
    variation(
        "true_prefixes",
        "Rolling Forcing, true prefixes",
        "half of the rollouts go on from a first block that the student did not choose",
        "true_prefix_probability=0.5",
        "load_raw_video=true",
    ),
    variation(
        "motion_guard",
        "Rolling Forcing, motion guard",
        "the error on true clips, in the windows of rollouts, beside the loss",
        "motion_guard_weight=1.0",
        "motion_guard_attention=windows",
        "load_raw_video=true",
    ),
    variation(
        "guidance_3",
        "Rolling Forcing, guidance as published",
        "scores that lead further away from what the prompt does not say",
        "guidance_scale=3.0",
    ),
    variation(
        "critic_warmup",
        "Rolling Forcing, the critic trained first",
        "a critic that knows the student's videos before the student learns from it",
        "critic_warmup_steps=100",
    ),
    variation(
        "low_scores",
        "Rolling Forcing, scores below the highest noise",
        "no scores where the teacher cannot see what the prompt leaves open",
        "max_score_timestep=700",
    ),
    Row(
        "rolling_on_block",
        "Rolling inference, Self Forcing's weights",
        "whether the rolling window has to be trained",
        ROLLING.config,
        weights=BLOCK.key,
        against=ROLLING.key,
    ),
    Row(
        "block_on_rolling",
        "Block-by-block inference, Rolling Forcing's weights",
        "whether what training with the window teaches shows without it",
        BLOCK.config,
        weights=ROLLING.key,
        against=BLOCK.key,
    ),
    of_start("ode_init", "ODE start"),
    of_start("teacher_forcing", "Teacher forcing"),
    of_start("consistency_init", "Consistency start"),
    of_start(START, "Causal start"),
    of_start(START, "Causal start", rolling=True),
)

ROWS = {row.key: row for row in (*CORE, *FURTHER)}


@dataclass(frozen=True)
class Comparison:
    """Two rows, `one` minus `other`, and what their difference tells."""

    title: str
    one: str
    other: str


EQUAL_SINK = (
    Comparison("the rolling window, without a sink", ROLLING_BARE.key, BLOCK_BARE.key),
    Comparison("the rolling window, with a sink", ROLLING.key, BLOCK.key),
)


WITHOUT_TRAINING = (
    Comparison(
        "the rolling window, with a sink, both with Self Forcing's weights",
        "rolling_on_block",
        BLOCK.key,
    ),
    Comparison(
        "the rolling window, with a sink, both with Rolling Forcing's weights",
        ROLLING.key,
        "block_on_rolling",
    ),
    Comparison(
        "the rolling window with a sink, against block by block with a deep sink",
        ROLLING.key,
        "sink_deep",
    ),
    Comparison(
        "the rolling window with Self Forcing's weights, against block by block whose clean passes "
        "do not see the sink either",
        "rolling_on_block",
        "sink_unseen",
    ),
)
"""What the way in which a video is played does, apart from what was trained."""


BETWEEN_STARTS = tuple(
    Comparison(f"{ROWS[key].title}, against the causal start's", key, f"{START}_alone")
    for key in ("ode_init_alone", "teacher_forcing_alone", "consistency_init_alone")
)
"""What a start keeps that has not learned the windows of rollouts on true clips."""


def comparisons() -> Iterator[Comparison]:
    """All that are made: the window, the sink, both without training, starts, then each further row
    against its own.
    """
    yield from EQUAL_SINK
    yield Comparison("the sink, block by block", BLOCK.key, BLOCK_BARE.key)
    yield Comparison("the sink, with the rolling window", ROLLING.key, ROLLING_BARE.key)
    yield from WITHOUT_TRAINING
    yield from BETWEEN_STARTS
    for row in FURTHER:
        if row.against is not None:
            title = f"{row.title}, against {ROWS[row.against].title}"
            yield Comparison(title, row.key, row.against)


def training_of(key: str) -> Weights:
    """The training whose weights a row or a start has."""
    if key in STARTS:
        return STARTS[key]
    row = ROWS[key]
    return Weights(row.config, row.overrides) if row.weights is None else training_of(row.weights)
