"""An applied Feast repository with the views of `ride_views`, and a few drivers in its store."""

import warnings
from datetime import UTC, datetime, timedelta

import pandas as pd
import ride_views
from feast import FeatureService, FeatureStore

NOW = datetime.now(UTC)
ROWS = pd.DataFrame(
    {
        "driver_id": [1, 2, 4],
        "rating": [4.5, None, 3.0],
        "trips": [10, 2, 3],
        "city": ["Zürich", None, "Bern"],
        "joined": [datetime(2023, 11, 17, tzinfo=UTC), None, datetime(2023, 11, 18, tzinfo=UTC)],
        "scores": [[1.0, 2.5], None, [3.0]],
        "event_timestamp": [NOW, NOW, NOW - timedelta(hours=2)],
    }
)
SERVICES = {
    "quotes": [ride_views.stats[["trips"]], ride_views.quote],
    "halves": [ride_views.halved[["half"]]],
    "several": [ride_views.quote[["fare", "days"]], ride_views.halved],
    "request_only": [ride_views.metres],
    "stored": [ride_views.known],
}


def definitions():
    return [
        ride_views.driver,
        *(ride_views.stats, ride_views.known),
        *(ride_views.quote, ride_views.halved, ride_views.one_by_one, ride_views.metres),
        *(FeatureService(name=name, features=own) for name, own in SERVICES.items()),
    ]


def write_ride_repo(folder, online_store):
    """Driver 1 is all there, 2 has nulls, 4 is out of date; others were never written."""
    (folder / "feature_store.yaml").write_text(
        "project: rides\nprovider: local\nregistry: registry.db\n"
        f"online_store: {online_store}\nentity_key_serialization_version: 3\n"
    )
    store = FeatureStore(repo_path=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Feast's own, of on-demand views
        store.apply(definitions())
    store.write_to_online_store("stats", df=ROWS)
    store.write_to_online_store("known", df=ROWS)
