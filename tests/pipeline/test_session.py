"""Sessions: course, exact copies on the disk, branches that replay can repeat."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from pipeline import VideoPipeline, load_pipeline
from pipeline.session import MAX_BRANCH_POINTS, Block, Session, least_needed
from tests.conftest import TinyWorld
from utils.errors import UserError


@pytest.fixture(scope="module")
def pipe(tiny_world: TinyWorld) -> VideoPipeline:
    return load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")


def step(session: Session) -> Block:
    block = session.step()
    assert block is not None
    return block


def steps(session: Session, count: int) -> list[Tensor]:
    return [step(session).frames for _ in range(count)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_session_plays_pauses_and_ends(pipe: VideoPipeline) -> None:
    session = Session.start(pipe, "a red ball", seed=3, seconds=1.5)
    first = step(session)
    assert (first.index, first.first_frame, len(first.frames)) == (0, 0, 9)
    session.pause()
    assert (session.state, session.step()) == ("paused", None)
    session.play()
    change = session.set_prompt("a blue ball", "recache")
    assert session.prompt == "a blue ball"
    assert change.status == "pending"
    second = step(session)
    assert second.applied == (change,)
    assert second.first_frame == 9
    last = step(session)
    assert (len(last.frames), session.frames_made, session.state) == (3, 24, "ended")
    assert session.step() is None
    with pytest.raises(UserError, match="has ended"):
        session.set_prompt("more")
    session.close()
    session.close()
    assert session.num_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        session.play()


def test_what_is_in_view_is_told(pipe: VideoPipeline) -> None:
    session = Session.start(pipe, "a", seed=1)
    steps(session, 9)
    view = session.view()
    assert view["window"] == [[9, 4], [10, 3], [11, 2], [12, 1], [13, 0]]
    assert view["sink"] == [0, 1, 2]
    assert view["recent"] == [24, 25, 26]
    session.set_prompt("b", "cut")
    steps(session, 2)
    assert session.view()["sink"] == [27, 28, 29]
    session.close()


@pytest.mark.parametrize("policy", ["keep", "cut"])
def test_a_saved_session_goes_on_bit_for_bit(
    pipe: VideoPipeline, policy: Any, tmp_path: Path
) -> None:
    """In the middle of a blend or after a cut, with a change that still waits."""
    session = Session.start(pipe, "a red ball", seed=3, seconds=60)
    steps(session, 3)
    session.set_prompt("a blue ball", policy, 0 if policy == "cut" else 3)
    steps(session, 1)
    session.set_prompt("a green ball", seed=11)
    session.save(tmp_path / "copy")
    loaded = Session.load(pipe, tmp_path / "copy")
    assert same(steps(session, 3), steps(loaded, 3))
    assert loaded.record() == session.record()
    assert (loaded.prompt, loaded.seed, loaded.video_frames) == ("a green ball", 3, 960)
    other = Session.load(pipe, tmp_path / "copy", prompt="another", seed=5)
    assert not same(steps(other, 3)[2:], steps(loaded, 1))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_a_model_that_is_not_distilled_is_directed_alike(
    tiny_world: TinyWorld, sampler: str, tmp_path: Path
) -> None:
    """Guided, with solvers that remember steps: changed, saved in a blend, branched to a cut."""
    overrides = ["denoising_step_list=null", "sampling_steps=4", f"sampler={sampler}"]
    pipe = load_pipeline(tiny_world.config, device="cpu", overrides=overrides)
    session = Session.start(pipe, "a", seed=1)
    steps(session, 3)
    session.set_prompt("b", "recache", 1)
    steps(session, 1)
    session.save(tmp_path / "copy")
    assert same(steps(session, 3), steps(Session.load(pipe, tmp_path / "copy"), 3))
    branches = [session.branch(session.branch_points[-1], "c", policy="cut") for _ in range(2)]
    assert same(*(steps(branch, 2) for branch in branches))


@pytest.mark.slow
def test_the_same_networks_run_under_other_settings(
    pipe: VideoPipeline, tiny_world: TinyWorld
) -> None:
    """A video without a sink is the one of a config that says so, and its record says it, too."""
    override = "model_kwargs.sink_size=0"
    other = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", [override])
    ours = Session.start(pipe.variant([override]), "a", seed=1)
    theirs = Session.start(other, "a", seed=1)
    own = Session.start(pipe, "a", seed=1)
    frames = steps(ours, 9)
    assert same(frames, steps(theirs, 9))
    assert not same(frames, steps(own, 9))
    assert ours.record() == theirs.record()
    assert ours.record()["config"]["model_kwargs"]["sink_size"] == 0
    with pytest.raises(UserError, match="unknown key"):
        pipe.variant(["sink=0"])
    with pytest.raises(UserError, match="under torchrun"):  # its record said two ranks
        pipe.variant(["sequence_parallel=2"])
    unheard = ["compile=true", "vae_dtype=bfloat16", "dtype=bfloat16", "negative_prompt=other"]
    for override in (*unheard, "generator_name=Other", "text_embeddings=/nowhere"):
        with pytest.raises(UserError, match=override.split("=")[0]):
            pipe.variant([override])


@pytest.mark.parametrize("frugal", [False, True])
def test_a_step_that_fails_may_be_tried_again_unless_the_decoder_cannot_go_back(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, frugal: bool
) -> None:
    """A frugal one kept its place for ever: each try failed, and the session went on playing."""
    overrides = [f"vae_frugal={str(frugal).lower()}"]
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", overrides)
    session = Session.start(pipe, "a", seed=1)
    steps(session, 1)
    with monkeypatch.context() as broken:
        broken.setattr(pipe.vae, "decode_next", Mock(side_effect=RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            session.step()
    assert session.can_go_on is not frugal
    if not frugal:
        assert step(session).index == 1


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: (folder / "session.json").write_text("[1]"), "not of a session"),
        (lambda folder: (folder / "session.json").write_text("{"), "no readable description"),
        (lambda folder: (folder / "session.json").write_text('{"version": 1}'), "no description"),
        (lambda folder: (folder / "state.safetensors").write_bytes(b"x" * 99), "no readable state"),
        (lambda folder: (folder / "state.safetensors").unlink(), "does not exist"),
    ],
)
def test_damaged_copies_are_refused(
    pipe: VideoPipeline, damage: Any, word: str, tmp_path: Path
) -> None:
    session = Session.start(pipe, "a", seed=3)
    steps(session, 1)
    damage(session.save(tmp_path / "copy"))
    with pytest.raises(UserError, match=word):
        Session.load(pipe, tmp_path / "copy")


@pytest.mark.slow
def test_a_copy_of_another_model_or_without_room_is_refused(
    pipe: VideoPipeline,
    tiny_world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session.start(pipe, "a", seed=3)
    steps(session, 1)
    session.save(tmp_path / "copy")
    for overrides, word in (
        (["height=64"], "block 1 of this state is"),
        (["denoising_step_list=[1000,500]"], "levels"),
        (["merge_clean_pass=false"], "merge_clean_pass True, not False"),
        (["context_noise=50"], "context_noise 0.*, not 50"),
    ):
        other = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", overrides)
        with pytest.raises(UserError, match=f"cannot go on here: .*{word}"):
            Session.load(other, tmp_path / "copy")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 10}))
    with pytest.raises(UserError, match=r"this session takes .* MiB, and only 0 MiB are free"):
        session.save(tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_branches_hold_their_parents_changes(pipe: VideoPipeline) -> None:
    """From the same point the same branch, twice; the parent goes on as if there were none."""
    session, alone = (Session.start(pipe, "a red ball", seed=3) for _ in range(2))
    for each in (session, alone):
        steps(each, 3)
        each.set_prompt("a blue ball", "recache")
        steps(each, 3)
    point = session.branch_points[3]
    assert (point.block, point.frame) == (4, 45)
    branches = [session.branch(point, "a green ball", seed=8) for _ in range(2)]
    assert same(steps(branches[0], 3), steps(branches[1], 3))
    assert same(steps(session, 2), steps(alone, 2))
    made = branches[0].record()["changes"]
    assert [(c["block"], c["policy"]) for c in made] == [(3, "recache"), (4, "branch"), (4, "keep")]
    assert branches[0].frames_made == 45 + 36
    again = branches[0].branch(branches[0].branch_points[1])
    assert [c.policy for c in again.changes] == ["recache", "branch", "keep", "branch"]
    with pytest.raises(UserError, match="no branch point"):
        branches[0].branch(point)
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.branch(point)


def test_branch_points_are_thinned_with_age() -> None:
    """At most 64, the first and the newest among them; gaps grow with the distance."""
    blocks: list[int] = []
    for block in range(1000):
        blocks.append(block)
        if len(blocks) > MAX_BRANCH_POINTS:
            del blocks[least_needed(blocks)]
    gaps = [b - a for a, b in pairwise(blocks)]
    assert (blocks[0], blocks[-1], len(blocks)) == (0, 999, MAX_BRANCH_POINTS)
    assert gaps[-5:] == [1] * 5
    assert max(gaps) < 200
    assert max(gaps[:20]) > 10 * max(gaps[-10:])


def test_branch_points_are_small(pipe: VideoPipeline) -> None:
    """Of the state of a stream the clean latents alone, and blocks in flight."""
    session = Session.start(pipe, "a", seed=1)
    steps(session, 8)
    exact = session._stream.rollout.cache.num_bytes
    assert session.branch_points[-1].num_bytes < exact / 2


def test_an_error_leaves_the_session_before_the_block(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")
    session, alone = (Session.start(pipe, "a", seed=3) for _ in range(2))
    frames = steps(session, 2)
    enlarging = pipe.vae.model.decoder.up_blocks[0].upsamplers[0].resample[1]
    for broken in (pipe.dit.blocks[1], enlarging):
        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", Mock(side_effect=MemoryError("full")))
            with pytest.raises(MemoryError):
                session.step()
        assert session.frames_made == 21
    assert same(frames + steps(session, 2), steps(alone, 4))
    assert session.record()["frames_hash"] == alone.record()["frames_hash"]


def test_a_folder_of_other_files_is_no_place_for_a_copy(
    pipe: VideoPipeline, tmp_path: Path
) -> None:
    """All that was in it was lost."""
    (tmp_path / "mine.txt").write_text("kept")
    session = Session.start(pipe, "a", seed=3)
    with pytest.raises(UserError, match="give a new folder"):
        session.save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"
    for _ in range(2):  # an older copy is replaced
        assert session.save(tmp_path / "copy") == tmp_path / "copy"


def test_a_block_counts_more_than_its_branch_point(
    pipe: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, alone = (Session.start(pipe, "a", seed=3) for _ in range(2))
    monkeypatch.setattr("pipeline.session.state_bytes", Mock(side_effect=MemoryError("full")))
    frames = steps(session, 2)
    assert session.branch_points == []
    monkeypatch.undo()
    assert same(frames + steps(session, 1), steps(alone, 3))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "2", True, None])
def test_lengths_are_numbers_of_seconds(pipe: VideoPipeline, seconds: Any) -> None:
    if seconds is None:
        assert Session.start(pipe, "a", seconds=None).video_frames is None
        return
    with pytest.raises(UserError, match="seconds must be a number"):
        Session.start(pipe, "a", seconds=seconds)


def test_a_record_is_plain_values(pipe: VideoPipeline) -> None:
    """A prompt with `${` in it broke the record of its video."""
    session = Session.start(pipe, "a", seed=3)
    session.set_prompt("costs ${5", "cut")
    steps(session, 1)
    record = session.record()
    assert json.loads(json.dumps(record)) == record
    assert record["latent_frames"] is None
    assert record["checkpoint"] == "distilled.pt"
    assert record["config"]["generator_name"] == "Tiny"
    assert record["config"]["dtype"] == "float32"
    assert record["config"]["merge_clean_pass"] is True
