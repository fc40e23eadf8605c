"""Whose turn it is, when several callers wait: deficit round robin, by rows. Pure.

Each round gives every caller who waits `quantum` rows. A caller who takes more than he was given
owes the rest, and sits out as many rounds as that takes: they are skipped in one step, so that
what a turn costs depends on neither rows nor callers. Who comes anew joins the next round, at its
end; what he owes is remembered until its round has passed, or he would be better off coming and
going than staying.

Source: Shreedhar and Varghese, "Efficient fair queuing using deficit round robin", SIGCOMM 1995;
debts instead of savings, as in the surplus round robin of Adiseshu, Parulkar and Varghese, 1996.
"""

import itertools

from headrace.batching.callers import Caller
from headrace.batching.eviction import CALLERS_MAX, idlest

QUANTUM_ROWS = 1
"""The smallest: who asks for little is served soonest."""

_SIZES = 48  # powers of two


class Share:
    """What is known of one caller who waits, or who owes; `Shares` changes it."""

    __slots__ = ("_credit", "caller", "count", "place", "round", "rows")

    def __init__(self, caller: Caller, credit: int) -> None:
        self.caller = caller
        self.count = 0
        """Requests of his that wait."""
        self.rows = 0
        """Rows of them."""
        self.round = 0
        """In which he has his next turn."""
        self.place = 0
        """His place in it; no two are equal."""
        self._credit = credit

    @property
    def turn(self) -> tuple[int, int]:
        """When it is his turn: the least of those who wait goes first."""
        return self.round, self.place


class Shares:
    """
    The turns of those who share something; not safe for several threads at once.

    Two callers who both wait throughout get as many rows as each other, but for `quantum` and the
    rows of the largest request.

    Args:
        quantum: Rows given to each in each round; at least 1.
        most: Callers remembered who do not wait, and owe; the ones who owe least make room.
    """

    def __init__(self, quantum: int = QUANTUM_ROWS, most: int = CALLERS_MAX) -> None:
        self.rows = 0
        """Of all who wait."""
        self._quantum = quantum
        self._most = most
        self._round = 0
        self._places = itertools.count(1)
        self._waiting: dict[Caller, Share] = {}
        self._owing: dict[Caller, Share] = {}
        # By the size of what they have waiting, as a power of two: how many callers, and rows.
        self._callers_by_size = [0] * _SIZES
        self._rows_by_size = [0] * _SIZES

    def find(self, caller: Caller) -> Share | None:
        """Return the share of a caller who waits or owes."""
        return self._waiting.get(caller) or self._owing.get(caller)

    def came(self, caller: Caller, rows: int) -> Share:
        """Count one more request of a caller that waits; return his share."""
        share = self._waiting.get(caller)
        if share is None:
            share = self._owing.pop(caller, None) or Share(caller, self._quantum)
            if share.round <= self._round:
                share.round = self._round + 1
                share._credit = self._quantum  # noqa: SLF001 its own module
            share.place = next(self._places)
            self._waiting[caller] = share
        share.count += 1
        self._resize(share, rows)
        return share

    def went(self, share: Share, rows: int) -> None:
        """Count one request less."""
        share.count -= 1
        self._resize(share, -rows)
        if not share.count:
            del self._waiting[share.caller]
            if share.round > self._round:
                self._owing[share.caller] = share
                if len(self._owing) > self._most:
                    self._forget()

    def spend(self, share: Share, rows: int) -> None:
        """Charge a caller, who waits, for rows that he is given now."""
        self._round = max(self._round, share.round)
        share._credit -= rows  # noqa: SLF001 its own module
        if share._credit <= 0:  # noqa: SLF001
            rounds = -share._credit // self._quantum + 1  # noqa: SLF001
            share.round += rounds
            share.place = next(self._places)
            share._credit += rounds * self._quantum  # noqa: SLF001

    def state(self, share: Share) -> tuple[int, int, int, int]:
        """Return all that `spend` changes, for `restore`."""
        return self._round, share.round, share.place, share._credit  # noqa: SLF001 its own module

    def restore(self, share: Share, state: tuple[int, int, int, int]) -> None:
        """Undo what was spent since `state`; the first of several states that were taken last."""
        self._round, share.round, share.place, share._credit = state  # noqa: SLF001 its own module

    def rows_before(self, caller: Caller, rows: int) -> int:
        """
        Estimate how many rows of others are served before so many of a caller's are.

        Each of the others is ahead with what he has waiting, but with no more than the caller
        himself. In a number of steps that does not depend on how many there are: those who have
        about as much as he count in full, up to that, which is never too little, and for them at
        most twice too much.
        """
        share = self.find(caller)
        own = 0
        if share is not None:
            own = share.rows
            rows += max(0, share.round - self._round - 1) * self._quantum
        size, own_size = rows.bit_length(), own.bit_length()
        fewer = sum(self._rows_by_size[:size])
        as_many_rows, as_many = self._rows_by_size[size], self._callers_by_size[size]
        more = sum(self._callers_by_size[size + 1 :])
        if own_size < size:
            fewer -= own
        elif own_size == size:
            as_many_rows -= own
            as_many -= bool(own)
        else:
            more -= 1
        return fewer + min(as_many_rows, as_many * rows) + more * rows

    def __len__(self) -> int:
        """Callers who wait."""
        return len(self._waiting)

    def _resize(self, share: Share, rows: int) -> None:
        self.rows += rows
        before = share.rows
        after = share.rows = before + rows
        size = before.bit_length()
        self._rows_by_size[size] -= before
        if after.bit_length() != size:
            if before:
                self._callers_by_size[size] -= 1
            size = after.bit_length()
            if after:
                self._callers_by_size[size] += 1
        self._rows_by_size[size] += after

    def _forget(self) -> None:
        ends = {caller: share.round for caller, share in self._owing.items()}
        for caller in idlest(ends, self._round, self._most):
            del self._owing[caller]
