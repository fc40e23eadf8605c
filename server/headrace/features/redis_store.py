"""Online features from Redis, written by Feast: one pipeline and one decode per batch.

For each key group of the plan one HMGET per entity is packed (`redis_commands`), or one HGETALL
where that costs the server less (`hash_reads`); all are sent and answered at once (`redis_pool`,
`redis_sentinel`, `redis_cluster`), and each group's replies become columns (`cells`).
"""

import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import FeatureStoreUnavailable
from headrace.features.cells import DecodedGroup, GroupDecoder, UnexpectedReplyError
from headrace.features.hash_reads import PROBE_PERIOD_S, PROBE_ROWS, WANTED_MIN, prefers_whole
from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.redis_commands import CommandPacker, PackedCommands
from headrace.features.redis_pool import RedisTopology, Replies
from headrace.features.store import FeatureRows, RowBlocks, row_count

PROBE_AGAIN_S = 1.0
"""After hashes that are not there."""

_UNAVAILABLE = "the online feature store does not answer"
_log = structlog.get_logger(__name__)


class RedisStore:
    """
    An `OnlineStore` over Redis or Valkey in Feast's layout.

    The user that logs in must be allowed HMGET and ECHO, and had better be allowed HGETALL.

    Args:
        servers: The server, or the servers that are asked as one.
    """

    def __init__(self, servers: RedisTopology) -> None:
        self.mismatches = 0
        """Values met that were damaged or not of their feature's type."""
        self._servers = servers
        self._readers: weakref.WeakKeyDictionary[FeaturePlan, list[_GroupReader]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        self._reported: set[tuple[str, str]] = set()
        self._is_up = True

    def read(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        *,
        now_s: float,
        timeout_s: float,
        max_age_s: float | None = None,
    ) -> FeatureRows:
        deadline_s = time.monotonic() + timeout_s
        readers = self._readers.get(plan) or self._prepare(plan)
        rows = row_count(plan, entities)
        ways = [self._way(reader, entities, deadline_s) for reader in readers]
        try:
            blocks = self._read(plan, readers, ways, entities, rows, deadline_s)
        except UnexpectedReplyError as error:
            if not any(way.is_whole for way in ways):
                raise self._unexpected(error) from None
            for reader in readers:  # this user may not HGETALL any more, perhaps
                reader.choose(is_whole=False)
            try:
                ways = [reader.way for reader in readers]
                blocks = self._read(plan, readers, ways, entities, rows, deadline_s)
            except UnexpectedReplyError as error:
                raise self._unexpected(error) from None
        self._is_up = True
        return blocks.finish(now_s, max_age_s)

    def check(self) -> None:
        try:
            self._servers.check()
        except OSError as error:
            raise self._down(str(error)) from None
        self._is_up = True

    def is_held_off(self) -> bool:
        return self._servers.is_held_off()

    def close(self) -> None:
        self._servers.close()

    def _prepare(self, plan: FeaturePlan) -> list["_GroupReader"]:
        readers = [_GroupReader(plan, group, self._note_mismatch) for group in plan.groups]
        with self._lock:
            return self._readers.setdefault(plan, readers)

    def _read(
        self,
        plan: FeaturePlan,
        readers: Sequence["_GroupReader"],
        ways: Sequence["_Way"],
        entities: Mapping[str, NDArray[Any]],
        rows: int,
        deadline_s: float,
    ) -> RowBlocks:
        packed = [way.packer.pack(entities, rows) for way in ways]
        answers = self._ask(packed, deadline_s)
        blocks = RowBlocks(plan, rows)
        for reader, way, commands, replies in zip(readers, ways, packed, answers, strict=True):
            reader.place(blocks, way.decoder.decode(replies.data, commands.rows), replies.inverse)
        return blocks

    def _way(
        self, reader: "_GroupReader", entities: Mapping[str, NDArray[Any]], deadline_s: float
    ) -> "_Way":
        """Return how to read now; look at some hashes when that was long ago."""
        now_s = time.monotonic()
        if now_s < reader.probe_s:
            return reader.way
        reader.probe_s = now_s + PROBE_PERIOD_S
        some = {name: column[:PROBE_ROWS] for name, column in entities.items()}
        commands = reader.whole.packer.pack(some, len(next(iter(some.values()), (None,))))
        (replies,) = self._ask([commands], deadline_s)
        try:
            sample = reader.whole.decoder.sample(replies.data, commands.rows)
        except UnexpectedReplyError:  # this user may not HGETALL
            reader.choose(is_whole=False)
            return reader.way
        if sample is None:  # nobody of those is there: ask again, soon
            reader.probe_s = now_s + PROBE_AGAIN_S
        else:
            reader.choose(is_whole=prefers_whole(reader.wanted, sample))
        return reader.way

    def _ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        try:
            return self._servers.ask(packed, deadline_s)
        except OSError as error:
            raise self._down(str(error)) from None

    def _unexpected(self, error: UnexpectedReplyError) -> FeatureStoreUnavailable:
        self._servers.distrust()  # it may be another server than it was
        return self._down(str(error))

    def _down(self, reason: str) -> FeatureStoreUnavailable:
        if self._is_up:
            self._is_up = False
            _log.error("online_store_down", reason=reason)
        return FeatureStoreUnavailable(_UNAVAILABLE)

    def _note_mismatch(self, feature: PlannedFeature, reason: str) -> None:
        with self._lock:
            self.mismatches += 1
            is_new = (feature.view, feature.feature) not in self._reported
            self._reported.add((feature.view, feature.feature))
        if is_new:
            _log.warning(
                "stored_value_mismatch", view=feature.view, feature=feature.feature, reason=reason
            )


class _Way(NamedTuple):
    """Commands, and what decodes the replies to them."""

    packer: CommandPacker
    decoder: GroupDecoder
    is_whole: bool


class _GroupReader:
    """
    One key group of a plan: its commands, its replies, and where their columns belong.

    Args:
        plan: The plan.
        group: One of its groups.
        on_mismatch: As `GroupDecoder` takes it.

    Attributes:
        way: How it is read now.
        whole: How it is read by whole hashes.
        wanted: Fields that are read otherwise.
        probe_s: When to look at the hashes again, on `time.monotonic`'s clock.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        group: KeyGroup,
        on_mismatch: Callable[[PlannedFeature, str], None],
    ) -> None:
        self._fields = _Way(
            CommandPacker(plan, group),
            decoder := GroupDecoder(plan, group, on_mismatch),
            is_whole=False,
        )
        self.whole = _Way(
            CommandPacker(plan, group, is_whole=True),
            GroupDecoder(plan, group, on_mismatch, is_whole=True),
            is_whole=True,
        )
        self.way = self._fields
        self.wanted = len(group.fields)
        self.probe_s = 0.0 if self.wanted >= WANTED_MIN else math.inf
        self._features = _as_slice(group.features)
        self._views = _as_slice(group.views)
        columns = [plan.block_columns[i] for i in group.features]
        self._targets = {
            at.start: (columns[at.start][0], _as_slice([column for _, column in columns[at]]))
            for at in decoder.slices
        }

    def choose(self, *, is_whole: bool) -> None:
        """Read whole hashes from now on, or fields."""
        self.way = self.whole if is_whole else self._fields

    def place(
        self, blocks: RowBlocks, decoded: DecodedGroup, inverse: NDArray[np.intp] | None
    ) -> None:
        """Put what was read into the rows that asked; `inverse` says which is whose."""
        rows = slice(None) if inverse is None else inverse
        for at, values in decoded.columns:
            dtype, own = self._targets[at.start]
            blocks.blocks[dtype][:, own] = values[rows]
        if decoded.statuses is None:
            blocks.statuses[self._features] = FeatureStatus.PRESENT
        else:
            blocks.statuses[self._features] = decoded.statuses[rows].T
        blocks.event_times_s[self._views] = decoded.event_times_s[rows].T


def _as_slice(indices: Sequence[int]) -> slice | NDArray[np.intp]:
    """Neighbours as a slice: assigning to one costs numpy far less."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return np.array(indices, np.intp)
