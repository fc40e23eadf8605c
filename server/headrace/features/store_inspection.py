"""Looking at a Redis online store as an operator does: few commands, read-only, all bounded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeout,
)

from headrace.errors import StartupError

SCAN_KEYS = 1_000
"""Keys that one SCAN walks over, where all of them are sent."""

MATCH_KEYS = 10_000
"""Likewise, where few are: about a millisecond of the server's time."""

NEEDED = "SCAN and HMGET"
OPTIONAL = "DBSIZE, HLEN, TTL and OBJECT ENCODING"


class Scan(NamedTuple):
    """
    Keys that were found.

    Args:
        keys: Each once.
        walked: How many keys of the store were gone through for them, about.
        is_complete: Whether these were all of them.
    """

    keys: list[bytes]
    walked: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Hash:
    """
    What one hash is like; None is not known, because the user may not ask.

    Args:
        values: Of the fields that were asked for; None where there is none.
        fields: How many it has.
        encoding: As Redis names it.
        ttl_s: Until it expires; -1 for never.
    """

    values: list[bytes | None]
    fields: int | None
    encoding: str | None
    ttl_s: int | None


class StoreInspection:
    """
    A Redis database, through redis-py's client.

    Every error leaves as a StartupError that says whether the store was silent, refused the login
    or the command, or could not be asked at all.

    Args:
        connect: Makes the client.
        timeout_s: How long the client waits, for messages.
    """

    def __init__(self, connect: Callable[[], Any], timeout_s: float) -> None:
        self.denied: set[str] = set()
        """Optional commands that the user may not call."""
        self._timeout_s = timeout_s
        with self._told():
            self._client = connect()
            self._nodes = self._masters()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def key_count(self) -> int | None:
        """Return how many keys there are; None if the user may not ask."""
        with self._told():
            try:
                return sum(int(node.dbsize()) for node in self._nodes)
            except NoPermissionError:
                self.denied.add("DBSIZE")
                return None

    def scan(self, pattern: bytes | None, *, keys_max: int, walk_max: int) -> Scan:
        """
        Find keys.

        Args:
            pattern: In Redis's glob style; None for all.
            keys_max: How many are enough.
            walk_max: Most keys of the store to go through for them, about.
        """
        found: dict[bytes, None] = {}
        step = min(SCAN_KEYS if pattern is None else MATCH_KEYS, max(walk_max, 1))
        walked, is_complete = 0, True
        with self._told():
            for number, node in enumerate(self._nodes, 1):
                cursor = 0
                while True:
                    cursor, keys = node.scan(cursor, match=pattern, count=step)
                    found.update(dict.fromkeys(keys))
                    walked += step
                    if cursor == 0:
                        break
                    share = number / len(self._nodes)  # some of every node
                    if walked >= walk_max * share or len(found) >= keys_max * share:
                        is_complete = False
                        break
        is_complete &= len(found) <= keys_max
        return Scan(list(found)[:keys_max], max(walked, len(found)), is_complete)

    def look(self, keys: Sequence[bytes], fields: Sequence[bytes]) -> list[Hash]:
        """Look at keys; those that are no hashes are left out."""
        asked = list(fields) or [b""]
        with self._told():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(key, asked)
                pipeline.hlen(key)
                pipeline.object("ENCODING", key)
                pipeline.ttl(key)
            replies = pipeline.execute(raise_on_error=False) if keys else []
            hashes = []
            for values, *others in zip(*[iter(replies)] * 4, strict=True):
                if isinstance(values, NoPermissionError):
                    raise values
                rest = [
                    self._known(command, reply)
                    for command, reply in zip(("HLEN", "OBJECT", "TTL"), others, strict=True)
                ]
                if isinstance(values, list):
                    encoding = rest[1].decode() if isinstance(rest[1], bytes) else rest[1]
                    hashes.append(Hash(values, rest[0], encoding, rest[2]))
        return hashes

    def _known(self, command: str, reply: Any) -> Any:
        if isinstance(reply, NoPermissionError):
            self.denied.add(command)
        return None if isinstance(reply, Exception) else reply

    def _masters(self) -> list[Any]:
        if not hasattr(self._client, "get_primaries"):
            return [self._client]
        return [self._client.get_redis_connection(node) for node in self._client.get_primaries()]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(self._told_of(error)) from error

    def _told_of(self, error: Exception) -> str:
        chain = [error]  # redis-py's cluster client wraps what its nodes say
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 8:
            if not isinstance(cause, Exception):
                break
            chain.append(cause)
        for one in chain:
            text = _first_line(one)
            if isinstance(one, NoPermissionError):
                return (
                    f"the online store lets this user not look: {text}; {NEEDED} are needed, and "
                    f"{OPTIONAL} of use"
                )
            if isinstance(one, AuthenticationError | AuthenticationWrongNumberOfArgsError):
                return f"the online store refuses the login in connection_string: {text}"
        for one in chain:
            if isinstance(one, RedisTimeout | TimeoutError):
                return f"the online store does not answer within {self._timeout_s:g} s"
        if isinstance(error, RedisError | RedisClusterException | OSError):
            return f"the online store does not answer: {type(error).__name__}: {_first_line(error)}"
        # Only Python's own complaint of an option's name is surely without its value.
        text = _first_line(error) if isinstance(error, TypeError) else "see connection_string"
        return f"Feast cannot connect to the online store: {type(error).__name__}: {text}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
