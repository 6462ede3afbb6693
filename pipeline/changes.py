"""Changes of prompt while a video is made: what they are, when they are heard, how they are done.

A video is a function of its config, weights and seed, and of the list of its changes, each of which
names the block before whose windows it is made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import dropwhile, takewhile
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.rollout import Rollout
from pipeline.schedule import BlockLayout, ScheduleKind, Window
from utils.errors import UserError
from utils.noise import CounterNoise
from wan.geometry import VideoShape

Policy = Literal["keep", "recache", "renoise", "cut"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
RESTARTING = ("renoise", "cut")  # policies under which blocks in flight start again
BRANCH: Literal["branch"] = "branch"
"""In the list of changes: here cache and decoder were made anew (see `Stream.rebuild`)."""
LONGEST_BLEND = 1000  # blocks
Status = Literal["pending", "applied", "superseded"]


@dataclass
class Change:
    """A change of prompt or seed, made when `block` is the next block to be finished.

    Policies:

    - `keep`: the new text for every pass from now on; the past and the blocks in flight stay.
    - `recache`: and what is stored of the past, the sink included, gets the keys and values that
      its clean passes would have under the new text (see `Rollout.recache`).
    - `renoise`: and the blocks in flight start again from their noise.
    - `cut`: a new scene, without a past, in the decoder neither.

    With `blend_blocks` n (the first two) the text embeddings go from the old to the new ones in
    n steps of a block each; with `recache` the past follows at the end. `prompt`: None where only
    the seed changes. `seed`: None where it stays; a new one counts for the blocks that have not
    begun. `row`: of a batch, the only video that hears it; None for all.

    `first_block`: the first one that hears it. `whole_from`: from this block on blocks
    have heard nothing else; None if the video ends before. `windows_without_block`: so many more
    windows run before a block comes. `status`: a change that another one replaced before it was
    heard is `superseded` and was never made.
    """

    block: int
    prompt: str | None = None
    policy: Policy | Literal["branch"] = "keep"
    blend_blocks: int = 0
    row: int | None = None
    seed: int | None = None
    first_block: int | None = None
    whole_from: int | None = None
    windows_without_block: int = 0
    status: Status = "pending"

    @property
    def restarts(self) -> bool:
        """Whether blocks in flight start again."""
        return self.policy in RESTARTING

    def record(self) -> dict[str, Any]:
        """What has to be known to make the change again, as plain values."""
        return {name: getattr(self, name) for name in CAUSES if getattr(self, name) is not None}


CAUSES = ("block", "prompt", "policy", "blend_blocks", "row", "seed")
"""The fields of a change that decide what happens; the others follow from them."""


@dataclass(frozen=True)
class Timeline:
    """Where the blocks of a video lie in its frames: every scene's first block is shorter.

    `scenes`: the blocks with which scenes begin, in order; the first is 0.
    """

    layout: BlockLayout
    shape: VideoShape
    scenes: tuple[int, ...] = (0,)

    def start(self, block: int) -> int:
        """Number of the first video frame of a block."""
        return self.video_frames(self.layout.start(block))

    def video_frames(self, latent_frames: int) -> int:
        """Video frames of the first `latent_frames` latent frames."""
        return sum(
            self.shape.video_frames(min(end or latent_frames, latent_frames) - begin)
            for begin, end in self._spans()
            if latent_frames > begin
        )

    def latent_frames(self, video_frames: int) -> int:
        """Latent frames needed to hold `video_frames` video frames."""
        before = 0
        for begin, end in self._spans():
            here = None if end is None else self.shape.video_frames(end - begin)
            if here is None or before + here >= video_frames:
                return begin + self.shape.latent_frames(video_frames - before)
            before += here
        raise AssertionError("the last scene has no end")

    def _spans(self) -> Iterator[tuple[int, int | None]]:
        """First latent frame of each scene, and of the next one (None: there is none)."""
        starts = [self.layout.start(scene) for scene in self.scenes]
        return zip(starts, (*starts[1:], None), strict=True)

    def frames(self, block: int) -> int:
        """Video frames of a block."""
        return self.start(block + 1) - self.start(block)

    def block_from(self, frame: float) -> int:
        """The first block that begins at or after a video frame."""
        least = int(frame / (self.layout.block_frames * self.shape.strides.time))
        block = max(0, least - 1)
        while self.start(block) < frame:
            block += 1
        return block

    def with_cuts(self, changes: Iterable["Change"]) -> "Timeline":
        """The same with the scenes that the cuts among `changes` begin."""
        cuts = {change.block for change in changes if change.policy == "cut"}
        return replace(self, scenes=tuple(sorted({*self.scenes, *cuts})))


@dataclass(frozen=True, eq=False)
class _Blend:
    """The embeddings of a row on their way: `old` and `new` `[L, dim]`, over `blocks` blocks."""

    row: int
    old: Tensor
    new: Tensor
    block: int
    blocks: int
    recaches: bool


def check_change(
    kind: ScheduleKind, layout: BlockLayout, policy: str, blend_blocks: int, *, has_text: bool
) -> None:
    """UserError for a change that no video of this kind and layout can make."""
    if policy not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    if type(blend_blocks) is not int or not 0 <= blend_blocks <= LONGEST_BLEND:
        raise UserError(
            f"blend_blocks must be a number of blocks up to {LONGEST_BLEND}, not {blend_blocks!r}"
        )
    if blend_blocks and (policy in RESTARTING or not has_text):
        raise UserError(f"only a prompt under keep or recache can blend, not {policy}")
    if kind == "full":
        raise UserError(
            "a bidirectional model makes all blocks at once: its prompt cannot change meanwhile"
        )
    if policy == "cut" and layout.independent_first_frame:
        raise UserError(
            "a scene of this model begins with a block of one frame, which only the start of a "
            "video has: use renoise instead of cut"
        )


class Direction:
    """Makes the changes of one rollout, right before the window that is the first to hear them.

    `text`: what the rows hear now, `[B, L, dim]`; `scenes`: where scenes begin.
    """

    def __init__(self, rollout: Rollout, text: Tensor, negative: Tensor | None = None) -> None:
        """`negative` `[B, L, dim]`: what the unconditional rows of a guided rollout hear."""
        self.rollout = rollout
        self.text = text
        self.scenes: tuple[int, ...] = (0,)
        self.changes: list[Change] = []  # that were made
        self._negative = negative
        self._pending: list[tuple[Change, Tensor | None]] = []
        self._blends: list[_Blend] = []
        self._half_made: Change | None = None
        self._begun: int | None = None  # the last block whose windows have begun

    @property
    def pending(self) -> list[Change]:
        """What is to be made before the next window."""
        return [change for change, _ in self._pending]

    def add(
        self,
        text: Tensor | None,
        *,
        prompt: str | None = None,
        policy: Policy = "keep",
        blend_blocks: int = 0,
        row: int | None = None,
        seed: int | None = None,
        replaces: bool = True,
    ) -> Change:
        """A change before the next window, to embeddings `[1 or B, L, dim]`; see `Change`.

        It `replaces` those that wait for the same window and would not be heard any more. A block
        that an error has left half made stays as it was begun: the change waits for the next one.
        Raises UserError for one that is not possible.
        """
        self._check(text, policy, blend_blocks, row, seed)
        block = self._next_block()
        if block is None:
            raise UserError("the video ends before another prompt could be heard")
        change = Change(block, prompt, policy, blend_blocks, row, seed)
        restarts = False
        for old, old_text in self._pending:
            text_replaced = old_text is None or (text is not None and row in (None, old.row))
            replaced = text_replaced and (old.seed is None or seed is not None)
            if replaces and replaced and old is not self._half_made:
                old.status = "superseded"
            else:
                restarts |= old.restarts
        self._pending = [item for item in self._pending if item[0].status == "pending"]
        self._foresee(change, heard=text is not None, restarted=restarts)
        self._pending.append((change, text))
        return change

    @torch.no_grad()
    def prepare(self) -> None:
        """Make what is to be made before the next window. After an error it can be called again."""
        block = self.rollout.next_block
        while self._pending and self._pending[0][0].block == block:
            change, text = self._pending[0]
            self._half_made = change  # if this fails it has to be made to its end all the same
            self._make(change, text)
            self._half_made = None
            change.status = "applied"
            self.changes.append(change)
            del self._pending[0]
        self._go_on_blending()
        self._begun = block

    def rebuilt(self) -> None:
        """Note that cache and decoder were made anew before the next window."""
        block = self.rollout.next_block
        if block is not None:
            self.changes.append(Change(block, policy=BRANCH, status="applied"))

    def _next_block(self) -> int | None:
        """The next block that has not begun; None if there is none."""
        block, end = self.rollout.next_block, self.rollout.plan.schedule.num_blocks
        if block is None or block != self._begun:
            return block
        return block + 1 if end is None or block + 1 < end else None

    def _check(
        self, text: Tensor | None, policy: str, blend_blocks: int, row: int | None, seed: int | None
    ) -> None:
        batch = len(self.text)
        if text is None and seed is None:
            raise UserError("say what changes: a prompt, or a seed")
        plan = self.rollout.plan
        has_text = text is not None
        check_change(plan.schedule.kind, plan.layout, policy, blend_blocks, has_text=has_text)
        if row is not None:
            if type(row) is not int or not 0 <= row < batch:
                raise UserError(f"row must be one of the {batch} videos of the batch, not {row!r}")
            if batch > 1 and (policy in RESTARTING or seed is not None):
                raise UserError(
                    "the videos of a batch share their windows: only keep and recache can change "
                    "the prompt of one of them"
                )
        if text is not None and len(text) not in (1, 1 if row is not None else batch):
            raise UserError(f"text must be 1 or {batch} rows, not {len(text)}")
        if seed is not None and not isinstance(self._noise_source(), CounterNoise):
            raise UserError("the noise of this video was given: it has no seed to change")

    def _foresee(self, change: Change, *, heard: bool, restarted: bool) -> None:
        """Fill in when a change takes hold.

        `heard`: it brings a text. `restarted`: others wait that start the blocks in flight again.
        """
        plan, block = self.rollout.plan, change.block

        def windows(*, again: bool = change.restarts or restarted) -> Iterator[Window]:
            if again:
                return plan.restarted(block, stored=block).windows()
            return dropwhile(lambda w: w.first_block < block, self.rollout.coming_windows())

        if change.restarts and not restarted:
            now, then = (_finishing(windows(again=again), block) for again in (False, True))
            change.windows_without_block = then - now
        change.whole_from = _first_begun(windows(), block + change.blend_blocks)
        change.first_block = block if heard or change.restarts else change.whole_from

    # --- making ---------------------------------------------------------------------------------

    def _make(self, change: Change, text: Tensor | None) -> None:
        block = change.block
        if change.seed is not None:
            source = self._noise_source()
            assert isinstance(source, CounterNoise)
            windows = self.rollout.coming_windows()
            first = block if change.restarts else _first_begun(windows, block)
            if first is not None:
                self.rollout.noise.change(replace(source, seed=change.seed), first)
        rows = range(len(self.text)) if change.row is None else [change.row]
        if text is not None:
            new = text.expand(len(rows), -1, -1).to(self.text)
            old, new = _same_length(self.text, new)
            self._blends = [blend for blend in self._blends if blend.row not in rows]
            if change.blend_blocks:
                self._blends += [
                    _Blend(
                        row,
                        old[row],
                        new[i],
                        block,
                        change.blend_blocks,
                        change.policy == "recache",
                    )
                    for i, row in enumerate(rows)
                ]
            else:
                self._hear(rows, new)
        if change.policy in ("recache", "renoise") and not change.blend_blocks:
            self.rollout.recache(None if change.row is None else rows)
        if change.restarts:
            self.rollout.restart(scene=change.policy == "cut")
        if change.policy == "cut" and block not in self.scenes:
            self.scenes = (*self.scenes, block)

    def _go_on_blending(self) -> None:
        """Bring what blends to where it is at the next window."""
        block = self.rollout.next_block
        if block is None or not self._blends:
            return
        rows, mixed, ended = [], [], []
        for blend in self._blends:
            share = min(1.0, (block - blend.block + 1) / (blend.blocks + 1))
            rows.append(blend.row)
            mixed.append(torch.lerp(blend.old, blend.new, share) if share < 1 else blend.new)
            if share == 1:
                ended.append(blend)
        longest = max(len(text) for text in mixed)
        self._hear(rows, torch.stack([_padded(text, longest) for text in mixed]))
        if recached := [blend.row for blend in ended if blend.recaches]:
            self.rollout.recache(None if len(recached) == len(self.text) else recached)
        self._blends = [blend for blend in self._blends if blend not in ended]

    def _hear(self, rows: Sequence[int], text: Tensor) -> None:
        """From now on `rows` hear `text` `[rows, L, dim]`."""
        old, new = _same_length(self.text, text)
        now = old.clone()
        now[list(rows)] = new
        if not torch.equal(now, old):
            self._take(now)

    def _take(self, text: Tensor) -> None:
        """`text` `[B, L, dim]` is what is heard; nothing has changed if this fails."""
        rows = text
        if self._negative is not None:
            rows = torch.cat(_same_length(text, self._negative.to(text)))
        dit = self.rollout.dit
        encoded = dit.encode_text(rows.to(dit.device))
        self.text, self.rollout.text = text, encoded

    def _noise_source(self) -> Any:
        return self.rollout.noise.sources[-1][1]

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self, *, on_cpu: bool = False) -> dict[str, Any]:
        """What the next window hears, and all that was changed: tensors and plain values."""

        def kept(text: Tensor | None) -> Tensor | None:
            return text.cpu() if on_cpu and text is not None else text

        sources = self.rollout.noise.sources
        return {
            "text": kept(self.text),
            "scenes": list(self.scenes),
            "changes": [asdict(change) for change in self.changes],
            "pending": [[asdict(change), kept(text)] for change, text in self._pending],
            "blends": [
                {**vars(blend), "old": kept(blend.old), "new": kept(blend.new)}
                for blend in self._blends
            ],
            "begun": self._begun,
            "seeds": [
                [block, source.seed]
                for block, source in sources[1:]
                if isinstance(source, CounterNoise)
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the direction of another rollout of the same sizes stood."""
        noise = self.rollout.noise
        _, first = noise.sources[0]
        noise.restore(
            [(block, replace(first, seed=seed)) for block, seed in state["seeds"]]  # type: ignore[type-var]
        )
        self.scenes = tuple(state["scenes"])
        self.changes = [Change(**change) for change in state["changes"]]
        self._pending = [(Change(**change), text) for change, text in state["pending"]]
        self._blends = [
            _Blend(**{**blend, **{name: blend[name].to(self.text) for name in ("old", "new")}})
            for blend in state["blends"]
        ]
        self._begun = state["begun"]
        self._take(state["text"].to(self.text))


def _first_begun(windows: Iterable[Window], block: int) -> int | None:
    """The first block that begins once `block` or a later one is the next to be finished."""
    for window in windows:
        if window.first_block >= block:
            for number, level in window:
                if level == 0:
                    return number
    return None


def _finishing(windows: Iterable[Window], block: int) -> int:
    """So many windows finish a block that the first of them holds."""
    return sum(1 for _ in takewhile(lambda window: block in window.blocks, windows))


def _padded(text: Tensor, length: int) -> Tensor:
    """`[..., L, dim]` with zeros behind up to `length`."""
    return F.pad(text, (0, 0, 0, length - text.shape[-2]))


def _same_length(*texts: Tensor) -> tuple[Tensor, ...]:
    """Embeddings `[..., L, dim]` with zeros behind the shorter ones."""
    longest = max(text.shape[-2] for text in texts)
    return tuple(_padded(text, longest) for text in texts)
