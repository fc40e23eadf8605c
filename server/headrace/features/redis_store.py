"""Online features from Redis, written by Feast: one pipeline and one decode per batch.

For each key group of the plan one HMGET per entity is packed (`redis_commands`), or one HGETALL
where that costs the server less (`hash_reads`); all are sent and answered at once (`redis_pool`,
`redis_sentinel`, `redis_cluster`), and each group's replies become columns (`cells`).
"""

import math
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import FeatureStoreUnavailable
from headrace.features.breaker import PATIENCE_S
from headrace.features.cells import DecodedGroup, GroupDecoder, UnexpectedReplyError
from headrace.features.hash_reads import PROBE_PERIOD_S, PROBE_ROWS, WANTED_MIN, prefers_whole
from headrace.features.key_watch import KeyWatch
from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.redis_commands import CommandPacker, PackedCommands
from headrace.features.redis_errors import OversizedReplyError
from headrace.features.redis_pool import RedisTopology, Replies
from headrace.features.row_cache import RowCache, concatenate, take
from headrace.features.store import FeatureRows, RowBlocks, row_count

PROBE_AGAIN_S = 1.0
"""After hashes that are not there, or could not be read."""

FORGOTTEN_AT_ONCE_MAX = 4096
"""
Written keys that are looked for one by one. Of more, that came at once, everything is forgotten:
their look-up would keep readers from running.
"""

_REFUSALS = ("NOPERM", "ERR")
"""Of a user, or a server, that knows no HGETALL."""

_UNAVAILABLE = "the online feature store does not answer"
_log = structlog.get_logger(__name__)


class RedisStore:
    """
    An `OnlineStore` over Redis or Valkey in Feast's layout.

    The user that logs in must be allowed HMGET and ECHO, and had better be allowed HGETALL.

    Args:
        servers: The server, or the servers that are asked as one.
        cache_rows: Rows kept per plan and entity key, where all its views allow it (`row_cache`);
            0 keeps none.
        hears_writes: Whether to forget them as soon as they are written (`key_watch`).
        patience_s: A read that had less than this and was not answered says nothing of the store.
    """

    def __init__(
        self,
        servers: RedisTopology,
        *,
        cache_rows: int = 0,
        hears_writes: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.mismatches = 0
        """Values met that were damaged or not of their feature's type."""
        self.cache_hits = self.cache_misses = self.cache_invalidations = 0
        self._servers = servers
        self._cache_rows = cache_rows
        self._patience_s = patience_s
        self._readers: weakref.WeakKeyDictionary[FeaturePlan, list[_GroupReader]] = (
            weakref.WeakKeyDictionary()
        )
        self._cached: weakref.WeakSet[_GroupReader] = weakref.WeakSet()
        self._watch = KeyWatch(servers.masters, self) if hears_writes else None
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
        blocks = RowBlocks(plan, rows)
        started_s = time.monotonic()
        wanted = [_Wanted(reader, entities, rows, started_s) for reader in readers]
        if any(reader.cache is not None for reader in readers):
            self._count(wanted)
            wanted = [one for one in wanted if not one.is_served(blocks)]
        if wanted:
            self._fetch(wanted, blocks, deadline_s)
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
        if self._watch is not None:
            self._watch.close()
        self._servers.close()

    @property
    def is_listening(self) -> bool:
        """Whether what is cached is forgotten as soon as it is written."""
        return self._watch is not None and self._watch.is_listening

    def keys_written(self, keys: Sequence[bytes]) -> None:
        """Forget rows; see `key_watch.Listener`."""
        if len(keys) > FORGOTTEN_AT_ONCE_MAX:
            self.writes_missed()
            return
        now_s = time.monotonic()
        names: dict[Any, list[Hashable]] = {}
        count = 0
        for reader in self._cached_readers():
            packer, cache = reader.whole.packer, reader.cache
            if cache is None:
                continue
            own = names.get(packer.key_form)
            if own is None:  # plans of the same entities read the same keys
                found = map(packer.name_of, keys)
                own = names[packer.key_form] = [name for name in found if name is not None]
            count += cache.forget(own, now_s)
        if count:
            with self._lock:
                self.cache_invalidations += count

    def writes_missed(self) -> None:
        """Forget every row."""
        now_s = time.monotonic()
        for reader in self._cached_readers():
            if reader.cache is not None:
                reader.cache.clear(now_s)

    def _cached_readers(self) -> list["_GroupReader"]:
        with self._lock:
            return list(self._cached)

    def _prepare(self, plan: FeaturePlan) -> list["_GroupReader"]:
        readers = [
            _GroupReader(plan, group, self._note_mismatch, self._cache_rows)
            for group in plan.groups
        ]
        with self._lock:
            readers = self._readers.setdefault(plan, readers)
            self._cached.update(reader for reader in readers if reader.cache is not None)
        if self._watch is not None:
            for reader, group in zip(readers, plan.groups, strict=True):
                if reader.cache is not None:
                    self._watch.watch(group.key_prefix)
        return readers

    def _count(self, wanted: Sequence["_Wanted"]) -> None:
        counts = [one.counts() for one in wanted]
        with self._lock:
            self.cache_hits += sum(hits for hits, _ in counts)
            self.cache_misses += sum(misses for _, misses in counts)

    def _fetch(self, wanted: Sequence["_Wanted"], blocks: RowBlocks, deadline_s: float) -> None:
        ways = [self._way(one.reader, one.entities, deadline_s) for one in wanted]
        try:
            self._read(wanted, ways, blocks, deadline_s)
        except (UnexpectedReplyError, OversizedReplyError) as error:
            if not any(way.is_whole for way in ways):
                raise self._unusable(error) from None
            # This user may not HGETALL any more, perhaps, or a hash has grown.
            for one in wanted:
                one.reader.choose(is_whole=False)
            try:
                self._read(wanted, [one.reader.way for one in wanted], blocks, deadline_s)
            except (UnexpectedReplyError, OversizedReplyError) as error:
                raise self._unusable(error) from None
        self._is_up = True

    def _read(
        self,
        wanted: Sequence["_Wanted"],
        ways: Sequence["_Way"],
        blocks: RowBlocks,
        deadline_s: float,
    ) -> None:
        packed = [
            way.packer.pack(one.entities, one.rows) for one, way in zip(wanted, ways, strict=True)
        ]
        answers = self._ask(packed, deadline_s)
        for one, way, commands, replies in zip(wanted, ways, packed, answers, strict=True):
            one.place(blocks, way.decoder.decode(replies.data, commands.rows), replies.inverse)

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
        try:
            (replies,) = self._ask([commands], deadline_s)
            sample = reader.whole.decoder.sample(replies.data, commands.rows)
        except FeatureStoreUnavailable:
            reader.probe_s = now_s + PROBE_AGAIN_S
            raise
        except OversizedReplyError:  # no small hashes, then
            reader.choose(is_whole=False)
            return reader.way
        except UnexpectedReplyError as error:
            reader.choose(is_whole=False)
            if str(error) not in _REFUSALS:
                reader.probe_s = now_s + PROBE_AGAIN_S
            return reader.way
        if sample is None:  # nobody of those is there: ask again, soon
            reader.probe_s = now_s + PROBE_AGAIN_S
        else:
            reader.choose(is_whole=prefers_whole(reader.wanted, sample))
        return reader.way

    def _ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        given_s = deadline_s - time.monotonic()
        try:
            return self._servers.ask(packed, deadline_s)
        except OversizedReplyError:
            raise
        except OSError as error:
            if isinstance(error, TimeoutError) and given_s < self._patience_s:
                raise FeatureStoreUnavailable(_UNAVAILABLE) from None
            raise self._down(str(error)) from None

    def _unusable(
        self, error: UnexpectedReplyError | OversizedReplyError
    ) -> FeatureStoreUnavailable:
        if isinstance(error, UnexpectedReplyError):
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
        cache_rows: How many rows to keep, if the group's views allow it.

    Attributes:
        cache: Rows read before; None when none are kept.
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
        cache_rows: int = 0,
    ) -> None:
        is_cached = cache_rows and group.cache_max_age_s
        self.cache = RowCache(group.cache_max_age_s, cache_rows) if is_cached else None
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


class _Wanted:
    """
    What a batch wants of one key group, and what of it is to be read.

    Args:
        reader: Of the key group.
        entities: The batch's.
        rows: The batch's.
        started_s: When it is looked up, on `time.monotonic`'s clock.

    Attributes:
        entities: Those to be read: the batch's, or of a cached group each distinct one that the
            cache has not.
        rows: How many.
    """

    def __init__(
        self,
        reader: _GroupReader,
        entities: Mapping[str, NDArray[Any]],
        rows: int,
        started_s: float,
    ) -> None:
        self.reader, self.entities, self.rows = reader, entities, rows
        self._started_s = started_s
        self._found: DecodedGroup | None = None
        if reader.cache is None:
            return
        keys = reader.whole.packer.keys(entities, rows)
        first: dict[Any, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        distinct = list(first)
        hits, self._found = reader.cache.get(distinct, started_s)
        is_missing = np.ones(len(distinct), np.bool_)
        is_missing[hits] = False
        missing = np.flatnonzero(is_missing)
        # The rows found come first, then those to be read, in the order of `distinct` each.
        place = np.empty(len(distinct), np.intp)
        place[hits] = np.arange(len(hits))
        place[missing] = np.arange(len(hits), len(distinct))
        places = dict(zip(distinct, place.tolist(), strict=True))
        self._inverse = np.array([places[key] for key in keys], np.intp)
        self._missing_keys = [distinct[i] for i in missing.tolist()]
        at = np.array([first[key] for key in self._missing_keys], np.intp)
        self.entities = {name: column[at] for name, column in entities.items()}
        self.rows = len(missing)

    def counts(self) -> tuple[int, int]:
        """Return how many distinct rows the cache had, and how many it had not."""
        if self.reader.cache is None:
            return 0, 0
        return 0 if self._found is None else len(self._found.event_times_s), self.rows

    def is_served(self, blocks: RowBlocks) -> bool:
        """Put the rows into place if the cache had them all."""
        if self.rows or self._found is None:
            return False
        self.reader.place(blocks, self._found, self._inverse)
        return True

    def place(
        self, blocks: RowBlocks, decoded: DecodedGroup, inverse: NDArray[np.intp] | None
    ) -> None:
        """Put what was read into place, beside what the cache had, and into the cache."""
        cache = self.reader.cache
        if cache is None:
            self.reader.place(blocks, decoded, inverse)
            return
        if inverse is not None:
            decoded = take(decoded, inverse)
        cache.put(self._missing_keys, decoded, self._started_s)
        if self._found is not None:
            decoded = concatenate(self._found, decoded)
        self.reader.place(blocks, decoded, self._inverse)


def _as_slice(indices: Sequence[int]) -> slice | NDArray[np.intp]:
    """Neighbours as a slice: assigning to one costs numpy far less."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return np.array(indices, np.intp)
