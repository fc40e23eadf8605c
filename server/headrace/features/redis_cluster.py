"""Redis Cluster: each key is asked of the node that has its slot.

A batch's commands are sorted by node and sent to all nodes, and the replies are read as they come,
so that a batch takes as long as its slowest node, and no node is held responsible for another's
time. A node that sends the asker elsewhere is followed. One that fails makes the map of slots be
read anew; its keys are asked again if they have moved. Reading the map has a breaker of its own: a
cluster that is silent as a whole costs a batch's time to one asker at a time.

Masters only: replicas may lag behind. The map is an immutable snapshot, swapped whole.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import hiredis
import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import StartupError
from headrace.features.breaker import PATIENCE_S, Breaker
from headrace.features.redis_commands import MAX_PART_BYTES, PackedCommands, in_parts
from headrace.features.redis_connection import DesynchronizedError
from headrace.features.redis_conversation import Conversation, finish_all, reply_limit
from headrace.features.redis_errors import OversizedReplyError, error_word
from headrace.features.redis_options import RedisOptions, RedisServers
from headrace.features.redis_pool import CHECK_TIMEOUT_S, BreakerOpenError, RedisPool, Replies
from headrace.features.redis_redirects import (
    SLOTS,
    DamagedRepliesError,
    is_unserved,
    key_slot,
    may_redirect,
    read_redirect,
    split_replies,
)

MAX_ROUNDS = 5
"""Times that a key may be sent elsewhere."""
REFRESH_PERIOD_S = 0.1
"""While nodes fail, the map is read at most so often."""

FAIR_SHARE = 0.5
"""Who was given less than this of a batch's time has not failed when it is over."""

_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_ASKING_REPLY = b"+OK\r\n"
_log = structlog.get_logger(__name__)

_Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _SlotMap:
    """Which node has which slot; None has none."""

    nodes: tuple[RedisPool | None, ...]

    def masters(self) -> set[RedisPool]:
        return {node for node in self.nodes if node is not None}


class _Question(NamedTuple):
    """Rows of each key group to ask of one node."""

    node: RedisPool
    rows: list[tuple[int, list[int]]]  # (key group, its rows)
    is_asking: bool = False


class RedisCluster:
    """
    A `RedisTopology` of a Redis Cluster.

    Args:
        named: Some of its nodes; from them the others are learned, by the addresses that they
            announce. The login is the same at each.
        connect_timeout_s: The longest that connecting to a node may take.
        patience_s: As `RedisPool` takes it.

    Raises:
        StartupError: `named` has a database number or a unix socket, of which a cluster has none.
    """

    def __init__(
        self,
        named: RedisServers,
        *,
        connect_timeout_s: float = 1.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._login: RedisOptions = named.servers[0]
        if self._login.db:
            raise StartupError("db in connection_string does not go with Redis Cluster")
        if self._login.unix_socket_path is not None:
            raise StartupError("unix_socket_path in connection_string does not go with a cluster")
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s
        self._seeds: list[_Address] = [(server.host, server.port) for server in named.servers]
        self._pools: dict[_Address, RedisPool] = {}
        self._map: _SlotMap | None = None
        self._tried_s = float("-inf")
        self._lock = threading.Lock()  # of the pools
        self._refreshing = threading.Lock()
        self._map_breaker = Breaker()

    def ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        batch = _Batch(packed)
        fair_s = (deadline_s - time.monotonic()) * FAIR_SHARE
        slot_map = self._map or self._refresh(deadline_s)
        questions = self._questions(batch, batch.all_rows(), slot_map)
        for _ in range(MAX_ROUNDS):
            redirected, lost = self._ask_all(questions, batch, deadline_s, fair_s)
            if not redirected and not lost:
                return batch.replies()
            questions = redirected
            if lost or not all(question.is_asking for question in redirected):
                slot_map = self._refresh(
                    deadline_s,
                    unless=slot_map,
                    avoid=[question for question, _ in lost],
                    fair_s=fair_s,
                )
            if lost:
                rows = [pair for question, _ in lost for pair in question.rows]
                again = self._questions(batch, rows, slot_map)
                failed = {question.node: error for question, error in lost}
                for question in again:
                    if question.node in failed:
                        raise failed[question.node]
                questions += again
        raise ConnectionError("the nodes of the cluster send one to another")

    def _ask_all(
        self, questions: Sequence[_Question], batch: "_Batch", deadline_s: float, fair_s: float
    ) -> tuple[list[_Question], list[tuple[_Question, OSError]]]:
        """Return what is to be asked elsewhere, and what could not be asked, with the reason."""
        lost: list[tuple[_Question, OSError]] = []
        asked: list[tuple[_Question, Conversation]] = []
        # Connecting takes time, and a node that hangs may take all there is: the others first.
        for question in sorted(questions, key=lambda question: not question.node.has_idle):
            try:
                exchanges = batch.exchanges(question)
                conversation = question.node.start(exchanges, deadline_s, fair_s=fair_s)
                asked.append((question, conversation))
            except OSError as error:
                lost.append((question, error))
        # All are finished, whatever becomes of some: what is on its way must be read.
        answers = finish_all([conversation for _, conversation in asked], batch.bytes_left)
        redirected: dict[tuple[RedisPool, bool], list[tuple[int, int]]] = {}
        for (question, _), answer in zip(asked, answers, strict=True):
            try:
                if isinstance(answer, OSError):
                    raise answer
                elsewhere = batch.take(question, answer)
            except OversizedReplyError:
                raise
            except OSError as error:
                lost.append((question, error))
                continue
            for group, row, host, port, is_asking in elsewhere:
                node = self._pool((host or question.node.address[0], port))
                redirected.setdefault((node, is_asking), []).append((group, row))
        return [
            _Question(node, _by_group(rows), is_asking)
            for (node, is_asking), rows in redirected.items()
        ], lost

    def check(self) -> None:
        slot_map = self._refresh(time.monotonic() + CHECK_TIMEOUT_S, is_forced=True)
        if None in slot_map.nodes:
            raise ConnectionError("some slots of the cluster are not served")
        for node in slot_map.masters():
            node.check()

    def distrust(self) -> None:
        self._tried_s = float("-inf")
        self._map = None

    def masters(self) -> Sequence[RedisPool]:
        return list((self._map or self._refresh(time.monotonic() + CHECK_TIMEOUT_S)).masters())

    def is_held_off(self) -> bool:
        slot_map = self._map
        if slot_map is None:
            return self._map_breaker.is_open
        return any(node.is_held_off() for node in slot_map.masters())

    def close(self) -> None:
        with self._lock:
            for pool in self._pools.values():
                pool.close()

    def _questions(
        self, batch: "_Batch", rows: Iterable[tuple[int, list[int]]], slot_map: _SlotMap
    ) -> list[_Question]:
        by_node: dict[RedisPool, dict[int, list[int]]] = {}
        for group, own in rows:
            for row in own:
                node = slot_map.nodes[batch.slot(group, row)]
                if node is None:
                    raise ConnectionError("no node of the cluster serves that slot")
                by_node.setdefault(node, {}).setdefault(group, []).append(row)
        return [_Question(node, list(own.items())) for node, own in by_node.items()]

    def _refresh(
        self,
        deadline_s: float,
        *,
        unless: _SlotMap | None = None,
        avoid: Sequence[_Question] = (),
        fair_s: float = 0.0,
        is_forced: bool = False,
    ) -> _SlotMap:
        """
        Read the map anew, unless it is another than `unless` by now, or was read a moment ago.

        While that fails, one asker at a time tries, and the others go on with what there is.

        Args:
            deadline_s: On `time.monotonic`.
            unless: What the asker has.
            avoid: Whom not to ask first.
            fair_s: A failure for want of less time than this means nothing.
            is_forced: Read it, whatever there is and has failed before.

        Raises:
            BreakerOpenError: there is none, and reading it is not being tried.
            OSError: there is none, and no node tells.
        """
        current, breaker = self._map, self._map_breaker
        remaining_s = deadline_s - time.monotonic()
        if current is not None and not is_forced and remaining_s <= 0:
            return current
        is_in_vain = breaker.is_open or (breaker.is_failing and current is not None)
        wait_s = 0.0 if is_in_vain and not is_forced else max(remaining_s, 0.0)
        if not self._refreshing.acquire(timeout=wait_s):
            if current is None:
                raise TimeoutError("no map of the cluster in time")
            return current
        try:
            current, now_s = self._map, time.monotonic()
            is_recent = now_s < self._tried_s + REFRESH_PERIOD_S
            if current is not None and not is_forced and (current is not unless or is_recent):
                return current
            attempt = None if is_forced else breaker.admits(now_s)
            if attempt is None and not is_forced:
                if current is None:
                    raise BreakerOpenError("no node of the cluster tells where its slots are")
                return current
            try:
                self._map = current = self._read_map(deadline_s, avoid)
                breaker.succeeded()
            except OSError as error:
                ended_s = time.monotonic()
                least_s = max(fair_s, self._patience_s)
                if isinstance(error, TimeoutError) and deadline_s - now_s < least_s:
                    breaker.left_open(ended_s, attempt)
                else:
                    breaker.failed(ended_s, attempt)
                if current is None or is_forced:
                    raise
            finally:
                self._tried_s = time.monotonic()
            return current
        finally:
            self._refreshing.release()

    def _read_map(self, deadline_s: float, avoid: Sequence[_Question]) -> _SlotMap:
        doubtful = {question.node for question in avoid}
        with self._lock:
            pools = dict(self._pools)
        doubtful.update(pool for pool in pools.values() if pool.is_held_off())
        known = [*pools, *(seed for seed in self._seeds if seed not in pools)]
        order = sorted(known, key=lambda address: pools.get(address) in doubtful)
        error: OSError = ConnectionError("no node of the cluster is known")
        for place, address in enumerate(order):
            share_s = max(deadline_s - time.monotonic(), 0.002) / (len(order) - place)
            try:
                return self._read_map_of(address, time.monotonic() + share_s)
            except OSError as reason:
                error = reason
        raise error

    def _read_map_of(self, address: _Address, deadline_s: float) -> _SlotMap:
        # Through a pool of its own: how this ends says nothing of how reading ends.
        node = RedisPool.to(self._login.at(*address), connect_timeout_s=self._connect_timeout_s)
        reply = node.command("CLUSTER", "SLOTS", deadline_s=deadline_s)
        if isinstance(reply, hiredis.ReplyError):
            raise ConnectionError(f"CLUSTER SLOTS is refused: {error_word(reply)}")
        try:
            ranges = [
                (int(first), int(last), _announced(host, address[0]), int(port))
                for first, last, (host, port, *_), *_ in reply
            ]
        except (TypeError, ValueError):
            raise DesynchronizedError("CLUSTER SLOTS is not understood") from None
        nodes: list[RedisPool | None] = [None] * SLOTS
        for first, last, host, port in ranges:
            nodes[first : last + 1] = [self._pool((host, port))] * (last + 1 - first)
        if len(nodes) != SLOTS:
            raise DesynchronizedError("CLUSTER SLOTS names slots that there are not")
        self._forget_others({(host, port) for _, _, host, port in ranges})
        return _SlotMap(tuple(nodes))

    def _pool(self, address: _Address) -> RedisPool:
        with self._lock:
            pool = self._pools.get(address)
            if pool is None:
                options = self._login.at(*address)
                pool = RedisPool.to(
                    options,
                    connect_timeout_s=self._connect_timeout_s,
                    patience_s=self._patience_s,
                )
                self._pools[address] = pool
                _log.info("redis_cluster_node", host=address[0], port=address[1])
            return pool

    def _forget_others(self, addresses: set[_Address]) -> None:
        with self._lock:
            for address in self._pools.keys() - addresses:
                self._pools.pop(address).close()


class _Batch:
    """A batch's commands, and the replies that have come so far."""

    def __init__(self, packed: Sequence[PackedCommands]) -> None:
        self._packed = packed
        self._commands = [commands.one_by_one() for commands in packed]
        self._order: list[list[int]] = [[] for _ in packed]  # rows, as their replies came
        self._data: list[list[bytes]] = [[] for _ in packed]
        self.bytes_left = reply_limit(packed)

    def all_rows(self) -> list[tuple[int, list[int]]]:
        return [(group, list(range(len(own)))) for group, own in enumerate(self._commands)]

    def slot(self, group: int, row: int) -> int:
        return key_slot(self._packed[group].key_of(self._commands[group][row]))

    def exchanges(self, question: _Question) -> list[list[tuple[int, Any]]]:
        parts = []
        for group, rows in question.rows:
            commands = [self._commands[group][row] for row in rows]
            if question.is_asking:
                commands = [_ASKING + command for command in commands]
            parts.append([(group, part) for part in in_parts(commands)])
        if sum(len(part) for own in parts for _, part in own) <= MAX_PART_BYTES:
            return [[own[0] for own in parts]]
        return [[part] for own in parts for part in own]

    def take(
        self, question: _Question, answers: Sequence[bytes]
    ) -> list[tuple[int, int, str, int, bool]]:
        """
        Keep a node's replies; return (group, row, host, port, is it ASK) of rows sent elsewhere.

        Raises:
            OSError: some replies say that the node cannot tell; nothing is kept.
        """
        kept: list[tuple[int, list[int], bytes]] = []
        elsewhere = []
        for (group, rows), data in zip(question.rows, answers, strict=True):
            if not question.is_asking and not may_redirect(data):
                kept.append((group, rows, data))
                continue
            replies = _split(data, len(rows), is_asking=question.is_asking)
            stay = []
            for row, reply in zip(rows, replies, strict=True):
                if is_unserved(reply):
                    raise ConnectionError(error_word(reply.decode(errors="replace")))
                redirect = read_redirect(reply)
                if redirect is None:
                    stay.append((row, reply))
                else:
                    is_ask = redirect.kind == "ASK"
                    elsewhere.append((group, row, redirect.host, redirect.port, is_ask))
            kept.append((group, [row for row, _ in stay], b"".join(reply for _, reply in stay)))
        self.bytes_left -= sum(map(len, answers))
        for group, rows, data in kept:
            self._order[group] += rows
            self._data[group].append(data)
        return elsewhere

    def replies(self) -> list[Replies]:
        """Return the replies, once all have come."""
        return [
            Replies(b"".join(data), _inverse(order, commands.inverse))
            for data, order, commands in zip(self._data, self._order, self._packed, strict=True)
        ]


def _inverse(order: list[int], inverse: NDArray[np.intp] | None) -> NDArray[np.intp]:
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    return places if inverse is None else places[inverse]


def _split(data: bytes, rows: int, *, is_asking: bool) -> list[bytes]:
    try:
        replies = split_replies(data)
    except DamagedRepliesError as error:
        raise DesynchronizedError(str(error)) from None
    if is_asking:
        if replies[::2] != [_ASKING_REPLY] * rows:
            raise DesynchronizedError("ASKING is not understood")
        replies = replies[1::2]
    if len(replies) != rows:
        raise DesynchronizedError(f"{len(replies)} replies to {rows} commands")
    return replies


def _by_group(rows: Iterable[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    by_group: dict[int, list[int]] = {}
    for group, row in rows:
        by_group.setdefault(group, []).append(row)
    return list(by_group.items())


def _announced(host: bytes | None, own: str) -> str:
    """Return the host that CLUSTER SLOTS names, or the one it was asked at."""
    name = (host or b"").decode(errors="replace")
    return own if name in {"", "?"} else name
