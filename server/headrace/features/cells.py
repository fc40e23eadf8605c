"""Decode a batch of Redis replies into columns: all of a kind at once, one by one only what is odd.

A batch is one HMGET reply per entity, each of the same fields, or one HGETALL reply, of every field
and its name. Two ways lead from its bytes to columns, and they agree:

- *Known layout.* Replies in which every field is there and has a length seen before differ from one
  another only in known places. When a batch fits a layout learned from an earlier one, byte for
  byte under a mask, the columns are strided views of the received bytes and nothing is parsed.
- *Any replies.* hiredis cuts them into cells; those of one kind are joined and looked at as one
  array, where tags, widths and varints are checked and decoded. Text and lists, and the rare cell
  that does not look as expected, go through `values.decode_value`.

Source: RESP2 (https://valkey.io/topics/protocol/), `features.values` and `features.plan`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
import numpy as np
from numpy.typing import NDArray

from headrace.features.cell_kinds import Reply, cell_kinds, decode_times, is_usual_time
from headrace.features.hash_reads import HashSample
from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.redis_errors import error_word
from headrace.features.reply_layout import ReplyLayout
from headrace.features.values import (
    ValueMismatchError,
    decode_value,
)

MAX_LAYOUTS = 16
"""Layouts remembered per key group: integers and fractions of seconds vary in length."""

_FED_BYTES = 16 << 10
"""
Given to the parser at once. Whenever it hands a reply over it moves what it has not read yet to the
front, so that its time grows with the square of this.
"""


class UnexpectedReplyError(Exception):
    """The store answered with something that is not one reply per entity."""


@dataclass(frozen=True, slots=True)
class DecodedGroup:
    """
    What one key group's replies held, a row per entity read.

    Args:
        columns: (which of `KeyGroup.features`, their values of shape (rows, features)) per kind.
        statuses: Shape (rows, features of the group); None when all are PRESENT.
        event_times_s: Shape (rows, views of the group); NaN where unknown.
    """

    columns: list[tuple[slice, NDArray[Any]]]
    statuses: NDArray[np.uint8] | None
    event_times_s: NDArray[np.float64]


class GroupDecoder:
    """
    Decodes the replies of one key group, and remembers the layouts it has met.

    Args:
        plan: The plan.
        group: One of its groups.
        on_mismatch: Called with a feature whose stored value is not of its type, and why.
        is_whole: Whether the replies are to HGETALL.

    Attributes:
        slices: Those that `DecodedGroup.columns` have, in order.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        group: KeyGroup,
        on_mismatch: Callable[[PlannedFeature, str], None],
        *,
        is_whole: bool = False,
    ) -> None:
        self._fields = group.fields
        self._is_whole = is_whole
        # Where each field is in replies to HGETALL, by the names in the order of the reply.
        self._orders: dict[tuple[bytes, ...], tuple[int | None, ...]] = {}
        self._features = [plan.features[i] for i in group.features]
        self._on_mismatch = on_mismatch
        self._width = len(group.fields)
        scalars = len(group.features) - group.object_count
        self._kinds = cell_kinds(self._features[:scalars])
        self._times = slice(scalars, scalars + len(group.views))
        self._objects = slice(scalars, len(self._features))
        # A cell's place in a reply, per feature: the event times come before the objects.
        self._cells = [*range(scalars), *range(self._times.stop, self._width)]
        self._layouts: dict[int, ReplyLayout] = {}
        self.slices = [kind.at for kind in self._kinds]
        if group.object_count:
            self.slices.append(self._objects)

    def decode(self, data: bytes, rows: int) -> DecodedGroup:
        """
        Decode `rows` replies.

        Raises:
            UnexpectedReplyError: `data` is not exactly that many arrays of the right width.
        """
        row_length, remainder = divmod(len(data), rows)
        known = None if remainder else self._layouts.get(row_length)
        if known is not None and (found := known.decode(data, rows)) is not None:
            columns, times_s = found
            return DecodedGroup(columns, None, times_s)
        replies = whole = self._parse(data, rows)
        if self._is_whole:
            replies = [self._pick(reply) for reply in whole]
        try:
            decoded = self._decode_replies(replies)
        except TypeError:  # a nil among the cells has no length and cannot be joined
            return self._decode_with_gaps(replies)
        if decoded.statuses is None and row_length not in self._layouts:
            self._learn(whole)
        return decoded

    def sample(self, data: bytes, rows: int) -> HashSample | None:
        """
        Say what the hashes in `rows` replies to HGETALL are like; None when there are none.

        Raises:
            UnexpectedReplyError: as `decode`.
        """
        found = [reply for reply in self._parse(data, rows) if reply]
        if not found:
            return None
        return HashSample(
            max(len(reply) // 2 for reply in found),
            max(len(value) for reply in found for value in reply[1::2] if value is not None),
        )

    def _parse(self, data: bytes, rows: int) -> list[Reply]:
        reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        replies: list[Reply] = []
        try:
            for first in range(0, len(data), _FED_BYTES):
                reader.feed(data[first : first + _FED_BYTES])
                while (reply := reader.gets()) is not _NOT_ENOUGH:
                    replies.append(self._checked(reply))
        except hiredis.ProtocolError as error:
            raise UnexpectedReplyError(str(error)) from None
        if len(replies) != rows or reader.has_data():
            raise UnexpectedReplyError(f"{len(replies)} whole replies to {rows} commands")
        return replies

    def _checked(self, reply: Any) -> Reply:
        if type(reply) is list and self._has_right_length(reply):
            return reply
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("WRONGTYPE"):
            # One key that somebody uses for something else is no reason to fail the rest.
            self._on_mismatch(self._features[0], "its key is not a hash")
            return [] if self._is_whole else [None] * self._width
        raise UnexpectedReplyError(_shown(reply))

    def _has_right_length(self, reply: Reply) -> bool:
        return len(reply) % 2 == 0 if self._is_whole else len(reply) == self._width

    def _pick(self, reply: Reply) -> Reply:
        """Pick the group's fields out of a whole hash."""
        return [None if at is None else reply[at] for at in self._places_in(reply)]

    def _places_in(self, reply: Reply) -> tuple[int | None, ...]:
        names = tuple(reply[::2])
        places = self._orders.get(names)  # type: ignore[arg-type]  # never nil, or not found
        if places is None:
            of_name = {name: 2 * i + 1 for i, name in enumerate(names)}
            places = tuple([of_name.get(name) for name in self._fields])
            if len(self._orders) < MAX_LAYOUTS:
                self._orders[names] = places  # type: ignore[index]
        return places

    def _decode_replies(self, replies: Sequence[Reply]) -> DecodedGroup:
        """Decode cells of which none is nil."""
        ok = np.ones((len(replies), len(self._features)), np.bool_)
        columns: list[tuple[slice, NDArray[Any]]] = []
        for kind in self._kinds:
            values, ok[:, kind.at] = kind.decode(replies)
            columns.append((kind.at, values))
        times_s = decode_times(replies, self._times)
        if self._objects.start < self._objects.stop:
            shape = (len(replies), self._objects.stop - self._objects.start)
            columns.append((self._objects, np.full(shape, None, np.object_)))
            ok[:, self._objects] = False
        if ok.all():
            return DecodedGroup(columns, None, times_s)
        statuses = np.full(ok.shape, FeatureStatus.PRESENT, np.uint8)
        for row, feature in np.argwhere(~ok).tolist():
            raw = replies[row][self._cells[feature]]
            value = self._decode_one(feature, raw) if raw else None
            if raw is None:  # text and lists are not joined: this is the first to see that
                statuses[row, feature] = FeatureStatus.NOT_FOUND
            elif value is None:
                statuses[row, feature] = FeatureStatus.NULL_VALUE
            else:
                at, values = next(entry for entry in columns if entry[0].stop > feature)
                values[row, feature - at.start] = value
        return DecodedGroup(columns, statuses, times_s)

    def _decode_with_gaps(self, replies: Sequence[Reply]) -> DecodedGroup:
        for reply in replies:
            for cell in reply:
                if cell is not None and type(cell) is not bytes:
                    raise UnexpectedReplyError(_shown(cell))
        absent = np.array([[cell is None for cell in reply] for reply in replies])
        decoded = self._decode_replies([[cell or b"" for cell in reply] for reply in replies])
        assert decoded.statuses is not None or not absent[:, self._cells].any()
        if decoded.statuses is not None:
            decoded.statuses[absent[:, self._cells]] = FeatureStatus.NOT_FOUND
        decoded.event_times_s[absent[:, self._times]] = np.nan
        return decoded

    def _decode_one(self, feature: int, raw: bytes) -> Any:
        try:
            return decode_value(raw, self._features[feature].value_type)
        except ValueMismatchError as error:
            self._on_mismatch(self._features[feature], str(error))
            return None

    def _learn(self, replies: Sequence[Reply]) -> None:
        """Remember the replies' layout, if they share one."""
        if len(self._layouts) >= MAX_LAYOUTS or self._objects.start < self._objects.stop:
            return
        parts, *others = [[part for part in reply if part is not None] for reply in replies]
        lengths = list(map(len, parts))
        if not all(list(map(len, other)) == lengths for other in others):
            return
        places = list(range(self._width))
        if self._is_whole:
            if any(other[::2] != parts[::2] for other in others):
                return
            # None of them is None: every cell was found.
            places = [at for at in self._places_in(parts) if at is not None]
        if all(is_usual_time(parts[at]) for at in places[self._times]):
            names = range(0, len(parts), 2) if self._is_whole else ()
            layout = ReplyLayout(self._kinds, parts, places, names)
            self._layouts[layout.length] = layout


def _shown(reply: Any) -> str:
    if isinstance(reply, hiredis.ReplyError):
        return error_word(reply)
    return f"a {type(reply).__name__} where an array is due"


_NOT_ENOUGH = object()
