"""Feast's SDK in a loop: the read that everything else is compared with.

    python feast_sdk.py FEATURE_REPO

Takes lines `ROWS SECONDS` and answers each with a line of JSON, as `http2.py` does. The kindest
form: the references are made once, the entities are as they come from a caller, the answer stays
Feast's.
"""

import json
import sys
import time

import numpy as np
from feast import FeatureStore
from feature_subjects import ENTITIES, references

WARM_UP_S = 0.5


def measure(store: FeatureStore, rows: int, seconds: float) -> dict[str, float]:
    """Read one request after the other."""
    ids = np.random.default_rng(3).integers(0, ENTITIES, (512, rows)).tolist()
    names = references()
    latencies_s: list[float] = []
    start_s = time.perf_counter() + WARM_UP_S
    cpu_s = 0.0
    while (now_s := time.perf_counter()) < start_s + seconds:
        store.get_online_features(
            features=names, entity_rows={"item_id": ids[len(latencies_s) % 512]}
        )
        if now_s >= start_s:
            cpu_s = cpu_s or time.process_time()
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


def main() -> int:
    """Answer lines until there are no more."""
    store = FeatureStore(repo_path=sys.argv[1])
    measure(store, 1, 0.1)
    print("serving", flush=True)
    for line in sys.stdin:
        rows, seconds = line.split()
        print(json.dumps(measure(store, int(rows), float(seconds))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
