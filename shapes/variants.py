"""What the ablations compare: whose weights are played in which way, and why."""

from dataclasses import dataclass

START = "causal_init"  # of every training here
INITIALISATIONS = ("ode_init", START)


@dataclass(frozen=True)
class Variant:
    """Weights and the way in which they are played.

    `config` names a file of configs/shapes, and so does `weights`: the training that they are
    from. `drawn`: in the plot of the curves. `long`: measured at the greater length, too.
    """

    key: str
    title: str
    why: str
    config: str
    weights: str
    drawn: bool = False
    long: bool = False


def whole(key: str, title: str, why: str, *, drawn: bool = True, long: bool = False) -> Variant:
    """A variant that is played as it was trained."""
    return Variant(key, title, why, key, key, drawn, long)


VARIANTS = (
    whole(
        "rolling_forcing",
        "Rolling Forcing",
        "the method: a rolling window of five levels, three sink frames",
        long=True,
    ),
    whole("self_forcing", "Self Forcing", "block by block, without a sink", long=True),
    whole("self_forcing_sink", "Self Forcing with a sink", "what a sink does without a window"),
    whole(
        "infinite_forcing",
        "Infinite-Forcing (V-sink)",
        "block by block, one sink frame kept right before the recent ones",
    ),
    whole(
        "rolling_no_sink",
        "Rolling Forcing, no sink",
        "what the window does without a sink",
        long=True,
    ),
    whole(
        "rolling_levels_3",
        "Rolling Forcing, 3 levels",
        "a shorter window: fewer levels, less latency",
        drawn=False,
    ),
    Variant(
        "rolling_on_self_forcing",
        "Rolling inference, Self Forcing's weights",
        "whether the rolling window has to be trained",
        "rolling_forcing",
        "self_forcing",
    ),
    Variant(
        "block_on_rolling",
        "Block-by-block inference, Rolling Forcing's weights",
        "whether what training with the window teaches shows without it",
        "self_forcing",
        "rolling_forcing",
    ),
    Variant(
        "no_sink_on_rolling",
        "Rolling inference without sink, weights trained with one",
        "what happens when the sink is taken away from weights that rely on it",
        "rolling_no_sink",
        "rolling_forcing",
    ),
    Variant(
        "sink_on_rolling_no_sink",
        "Rolling inference with sink, weights trained without one",
        "whether the sink has to be trained",
        "rolling_forcing",
        "rolling_no_sink",
    ),
    Variant(
        "rolling_on_ode_init",
        "ODE initialisation only, rolling",
        "what a student knows that has seen the teacher's videos alone",
        "rolling_forcing",
        "ode_init",
    ),
    Variant(
        "block_on_ode_init",
        "ODE initialisation only, block by block",
        "the same, block by block",
        "self_forcing",
        "ode_init",
    ),
    Variant(
        "rolling_on_causal_init",
        "causal initialisation only, rolling",
        "what distillation adds to where it starts",
        "rolling_forcing",
        "causal_init",
    ),
    Variant(
        "block_on_causal_init",
        "causal initialisation only, block by block",
        "the same, block by block",
        "self_forcing",
        "causal_init",
    ),
)

STUDENTS = tuple(dict.fromkeys(v.weights for v in VARIANTS if v.weights not in INITIALISATIONS))
