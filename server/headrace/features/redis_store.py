"""Online features from Redis, written by Feast: one pipeline and one decode per batch.

For each key group of the plan one HMGET per entity is packed (`redis_commands`), or one HGETALL
where that costs the server less (`hash_reads`); all are sent and answered in one exchange
(`redis_connection`), and each group's replies become columns (`cells`).
"""

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import FeatureStoreUnavailable
from headrace.features.cells import DecodedGroup, GroupDecoder, UnexpectedReplyError
from headrace.features.hash_reads import PROBE_PERIOD_S, PROBE_ROWS, WANTED_MIN, prefers_whole
from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.redis_commands import MAX_PART_BYTES, CommandPacker, PackedCommands
from headrace.features.redis_connection import RedisConnection, RedisOptions
from headrace.features.store import FeatureRows, RowBlocks, row_count

MAX_IDLE_CONNECTIONS = 8
CHECK_TIMEOUT_S = 1.0
PROBE_AGAIN_S = 1.0
"""After hashes that are not there."""

_PROBE = b"*3\r\n$5\r\nHMGET\r\n$14\r\nheadrace:probe\r\n$1\r\nf\r\n"
_UNAVAILABLE = "the online feature store does not answer"
_log = structlog.get_logger(__name__)

_Exchange = Sequence[tuple[int, Any]]  # (place of the key group, commands) each


class RedisStore:
    """
    An `OnlineStore` over a standalone Redis or Valkey in Feast's layout.

    A connection serves one thread at a time and is closed at the first irregularity. One that turns
    out to have died while idle is replaced, and the read tried once more. The user that logs in
    must be allowed HMGET and ECHO, and had better
    be allowed HGETALL.

    Args:
        options: Where the server is.
        connect_timeout_s: The longest that connecting may take, within a read's own time.
    """

    def __init__(self, options: RedisOptions, *, connect_timeout_s: float = 1.0) -> None:
        self.mismatches = 0
        """Values met that were damaged or not of their feature's type."""
        self._options = options
        self._connect_timeout_s = connect_timeout_s
        self._idle: deque[RedisConnection] = deque()
        self._readers: weakref.WeakKeyDictionary[FeaturePlan, list[_GroupReader]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        self._reported: set[tuple[str, str]] = set()
        self._is_up = True
        self._is_closed = False

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
                raise self._down(str(error)) from None
            for reader in readers:  # this user may not HGETALL any more, perhaps
                reader.choose(is_whole=False)
            try:
                ways = [reader.way for reader in readers]
                blocks = self._read(plan, readers, ways, entities, rows, deadline_s)
            except UnexpectedReplyError as error:
                raise self._down(str(error)) from None
        self._is_up = True
        return blocks.finish(now_s, max_age_s)

    def check(self) -> None:
        (reply,) = self._converse([[(0, _PROBE)]], time.monotonic() + CHECK_TIMEOUT_S)
        # A server that is loading its data echoes, and reads nothing. One that forbids this key
        # may allow those of features.
        if reply.startswith(b"-") and not reply.startswith(b"-NOPERM"):
            raise self._down(reply.decode(errors="replace").strip())
        self._is_up = True

    def close(self) -> None:
        self._is_closed = True
        self._drop_idle()

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
        replies = self._converse(_exchanges(packed), deadline_s)
        blocks = RowBlocks(plan, rows)
        for reader, way, commands, data in zip(readers, ways, packed, replies, strict=True):
            reader.place(blocks, way.decoder.decode(data, commands.rows), commands)
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
        (reply,) = self._converse(_exchanges([commands]), deadline_s)
        try:
            sample = reader.whole.decoder.sample(reply, commands.rows)
        except UnexpectedReplyError:  # this user may not HGETALL
            reader.choose(is_whole=False)
            return reader.way
        if sample is None:  # nobody of those is there: ask again, soon
            reader.probe_s = now_s + PROBE_AGAIN_S
        else:
            reader.choose(is_whole=prefers_whole(reader.wanted, sample))
        return reader.way

    def _converse(self, exchanges: Sequence[_Exchange], deadline_s: float) -> list[bytes]:
        """Return each key group's replies."""
        try:
            idle = self._idle.pop()
        except IndexError:
            idle = None
        try:
            try:
                replies = self._converse_on(idle, exchanges, deadline_s)
            except OSError as error:
                if idle is not None:  # it died while idle, and the others with it
                    self._drop_idle()
                if idle is None or isinstance(error, TimeoutError):
                    raise
                # Reading twice is harmless.
                replies = self._converse_on(None, exchanges, deadline_s)
        except OSError as error:
            raise self._down(str(error)) from None
        return replies

    def _converse_on(
        self, connection: RedisConnection | None, exchanges: Sequence[_Exchange], deadline_s: float
    ) -> list[bytes]:
        if connection is None:
            remaining_s = max(deadline_s - time.monotonic(), 0.001)
            connection = RedisConnection(self._options, min(remaining_s, self._connect_timeout_s))
        replies: dict[int, list[bytes]] = {}
        try:
            for exchange in exchanges:
                pieces = connection.exchange([commands for _, commands in exchange], deadline_s)
                for (group, _), piece in zip(exchange, pieces, strict=True):
                    replies.setdefault(group, []).append(piece)
        except BaseException:
            # What is still on its way would be taken for the answer to something else.
            connection.close()
            raise
        if self._is_closed or len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            self._idle.append(connection)
        return [b"".join(pieces) for pieces in replies.values()]

    def _drop_idle(self) -> None:
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

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

    def place(self, blocks: RowBlocks, decoded: DecodedGroup, commands: PackedCommands) -> None:
        """Put what was read into the rows that asked."""
        rows = slice(None) if commands.inverse is None else commands.inverse
        for at, values in decoded.columns:
            dtype, own = self._targets[at.start]
            blocks.blocks[dtype][:, own] = values[rows]
        if decoded.statuses is None:
            blocks.statuses[self._features] = FeatureStatus.PRESENT
        else:
            blocks.statuses[self._features] = decoded.statuses[rows].T
        blocks.event_times_s[self._views] = decoded.event_times_s[rows].T


def _exchanges(packed: Sequence[PackedCommands]) -> list[_Exchange]:
    """All at once when that is little enough, else part by part."""
    if sum(commands.byte_count for commands in packed) <= MAX_PART_BYTES:
        return [[(group, commands.parts[0]) for group, commands in enumerate(packed)]]
    return [[(group, part)] for group, commands in enumerate(packed) for part in commands.parts]


def _as_slice(indices: Sequence[int]) -> slice | NDArray[np.intp]:
    """Neighbours as a slice: assigning to one costs numpy far less."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return np.array(indices, np.intp)
