"""Feast's SDK in a loop: the read that everything else is compared with.

    python feast_sdk.py FEATURE_REPO

Takes lines `ROWS SECONDS RATE` and answers each with a line of JSON, as `http2.py` does: one
request after the other, or at a rate unless it is 0. A line `ROWS` alone is answered with the
values of the first request. The kindest form: the references are made once, the entities are as
they come from a caller, the answer stays Feast's.
"""

import json
import sys
import time

from feast import FeatureStore
from feature_subjects import ids, references

WARM_UP_S = 0.5


def measure(store: FeatureStore, rows: int, seconds: float, rate_per_s: float) -> dict[str, float]:
    """Read one request after the other, each when it is due: latencies count from then."""
    requests = ids(rows)
    names = references()
    latencies_s: list[float] = []
    due_s = time.perf_counter()
    start_s = due_s + WARM_UP_S
    cpu_s = 0.0
    sent = 0
    while (now_s := due_s if rate_per_s else time.perf_counter()) < start_s + seconds:
        if rate_per_s:
            time.sleep(max(0.0, due_s - time.perf_counter()))
            due_s += 1 / rate_per_s
        if now_s >= start_s:
            cpu_s = cpu_s or time.process_time()
        store.get_online_features(
            features=names, entity_rows={"item_id": requests[sent % len(requests)]}
        )
        sent += 1
        if now_s >= start_s:
            latencies_s.append(time.perf_counter() - now_s)
    took_s = time.perf_counter() - start_s
    ordered = sorted(latencies_s)
    return {
        "requests": len(ordered),
        "errors": 0,
        "requests_per_s": len(ordered) / took_s,
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[len(ordered) * 99 // 100],
        "cpu_ms": 1e3 * (time.process_time() - cpu_s) / max(1, len(ordered)),
    }


def values(store: FeatureStore, rows: int) -> dict[str, list[float]]:
    """Return the first request's values, by feature."""
    found = store.get_online_features(
        features=references(), entity_rows={"item_id": ids(rows)[0]}
    ).to_dict()
    return {name: found[name.partition(":")[2]] for name in references()}


def main() -> int:
    """Answer lines until there are no more."""
    store = FeatureStore(repo_path=sys.argv[1])
    measure(store, 1, 0.1, 0)
    print("serving", flush=True)
    for line in sys.stdin:
        rows, *how = line.split()
        answer = measure(store, int(rows), *map(float, how)) if how else values(store, int(rows))
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
