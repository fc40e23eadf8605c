"""Which arrangement of Redis servers a Feast repository names."""

from headrace.errors import StartupError
from headrace.features.breaker import PATIENCE_S
from headrace.features.redis_cluster import RedisCluster
from headrace.features.redis_options import RedisServers
from headrace.features.redis_pool import RedisPool, RedisTopology
from headrace.features.redis_sentinel import RedisSentinels, SentinelPool


def open_redis(
    redis_type: str,
    connection_string: str,
    sentinel_master: str,
    *,
    patience_s: float = PATIENCE_S,
) -> RedisTopology:
    """
    Make the client of a Redis online store; it connects when it is first used.

    Args:
        redis_type: Feast's setting: `redis`, `redis_cluster` or `redis_sentinel`.
        connection_string: Feast's setting, as `RedisServers.parse` reads it.
        sentinel_master: Feast's setting; of use with `redis_sentinel`.
        patience_s: As `RedisPool` takes it.

    Raises:
        StartupError: a setting is unusable, or they do not go together.
    """
    named = RedisServers.parse(connection_string)
    match redis_type:
        case "redis":
            return RedisPool.to(named.only(), patience_s=patience_s)
        case "redis_cluster":
            return RedisCluster(named, patience_s=patience_s)
        case "redis_sentinel":
            return SentinelPool(RedisSentinels(named, sentinel_master), patience_s=patience_s)
        case _:
            raise StartupError(f"redis_type {redis_type} of the online store is not supported")
