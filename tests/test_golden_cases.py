"""Guards the recorded cases: none may lie there without a test that runs it."""

import pytest

from tests.golden_cases import FACTS, recorded_names

# Tests run every case whose name starts so, and every one that is called so.
FAMILIES = (
    "rolling_inference",
    "self_forcing_inference",
    "infinite_forcing_inference",
    "causal_dit_rolling",
    "training_rollout",
)
SINGLE = {
    "wan_dit",
    "causal_dit_train",
    "scheduler",
    "dmd",
    "run_generator",
    "ode_regression",
    "umt5",
    "vae",
}


@pytest.mark.golden
def test_every_recorded_case_is_run() -> None:
    others = [
        name
        for name in recorded_names()
        if not name.startswith((*FAMILIES, *FACTS, "weights_")) and name not in SINGLE
    ]
    assert not others
