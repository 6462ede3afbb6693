"""Models and data that the trainings of the tests share."""

import pytest

from tests.tiny_training import TrainingWorld, write_training_world


@pytest.fixture(scope="session")
def training_world(tmp_path_factory: pytest.TempPathFactory) -> TrainingWorld:
    return write_training_world(tmp_path_factory.mktemp("training"))


@pytest.fixture(autouse=True)
def few_clips_tell_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export of a VAE encodes this many clips."""
    monkeypatch.setattr("trainer.export.STATISTICS_CLIPS", 4)
