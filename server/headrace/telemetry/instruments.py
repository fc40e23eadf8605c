"""Every metric of the server by name: its help, and how those of several workers become one."""

METRICS: dict[str, str] = {
    "headrace_requests_total": "Requests answered with a prediction.",
    "headrace_requests_failed_total": "Requests that reached a batch and were not answered.",
    "headrace_requests_refused_total": "Requests refused on arrival: the queue was full, or they "
    "could not have been answered before their deadline.",
    "headrace_requests_dropped_total": "Requests given up in the queue: their caller left, they "
    "would have been answered too late, the queue stood, or a higher level needed the room.",
    "headrace_requests_shed_total": "Of these, those that had waited too long while the queue "
    "stood.",
    "headrace_request_seconds": "From a request's arrival to the end of its batch's replies.",
    "headrace_queue_seconds": "How long a request waited for its batch.",
    "headrace_batches_total": "Batches run.",
    "headrace_batch_rows": "Rows in a batch.",
    "headrace_padding_rows_total": "Rows that batches were filled up with, to an allowed size.",
    "headrace_features_seconds": "Reading and joining a batch's features.",
    "headrace_infer_seconds": "Running the model on a batch.",
    "headrace_feature_values_total": "Feature values read, by status.",
    "headrace_queue_requests": "Requests waiting now.",
    "headrace_replies_held": "Replies that are ready and wait for an earlier one, of models with "
    "preserve_ordering.",
    "headrace_feature_requests_total": "Requests for features answered.",
    "headrace_feature_requests_failed_total": "Requests for features that reached a batch and "
    "were not answered.",
    "headrace_feature_request_seconds": "From the arrival of a request for features to the end of "
    "its batch's replies.",
    "headrace_feature_read_seconds": "Reading a batch of entities for requests for features.",
    "headrace_feature_batch_rows": "Entities in a batch of requests for features.",
    "headrace_feature_queue_requests": "Requests for features waiting now.",
    "headrace_feature_requests_shed_total": "Requests for features given up because they had "
    "waited too long while the queue stood.",
    "headrace_view_values_total": "Feature values read, for models or as they are, by view and "
    "status.",
    "headrace_view_age_seconds": "Ages of the rows read, by view: they grow when materialization "
    "stops.",
    "headrace_feature_store_readable": "Whether the feature store answered at the last look.",
    "headrace_feature_store_held_off": "Whether the feature store, or a node of it, failed so "
    "often that it is tried only now and then.",
    "headrace_stored_value_mismatches_total": "Stored values that were damaged or not of their "
    "feature's type.",
    "headrace_feature_cache_hits_total": "Rows of features served that had been read before.",
    "headrace_feature_cache_misses_total": "Rows of features that may be cached, and were read.",
    "headrace_feature_cache_invalidations_total": "Cached rows of features dropped because they "
    "were written.",
    "headrace_registry_readable": "Whether the feature registry could be read at the last look.",
    "headrace_registry_reads_total": "Looks at the feature registry that found a new state, or "
    "failed, by result.",
    "headrace_model_loads_total": "Attempts to load a model version, by result.",
    "headrace_calls_refused_total": "Hot calls, and messages of streams, refused before it was "
    "looked at which model they are for, by reason.",
    "headrace_rpc_errors_total": "Hot calls, and messages of streams, refused or failed, by gRPC "
    "code.",
    "headrace_rpc_open_calls": "Hot calls, and messages of streams, received and not yet finished.",
    "headrace_rpc_open_streams": "Streams that have not ended yet.",
    "headrace_spans_total": "Spans built, by what became of them.",
    "headrace_call_records_dropped_total": "Sampled and failed calls not told of.",
    "headrace_stream_rows_total": "Rows of predictions for the monitor, by what became of them.",
    "headrace_stream_queue_bytes": "Bytes of finished batches that wait for the monitor.",
    "headrace_stream_connected": "Whether the monitor takes predictions, as far as is known.",
    "headrace_skew_log_rows_total": "Sampled rows written to the skew log, dropped by its full "
    "queue, or lost because their file could not be written.",
    "headrace_skew_log_queue_bytes": "Bytes of sampled rows that wait for their file.",
    "headrace_skew_log_files_deleted_total": "Files of the skew log deleted to make room.",
    "headrace_gc_pause_seconds": "Collections of reference cycles, during which nothing else runs, "
    "by generation.",
    "headrace_workers": "Worker processes that there should be; only where there are several.",
    "headrace_workers_ready": "Worker processes that are ready.",
    "headrace_worker_restarts_total": "Worker processes that ended and were replaced, by worker.",
}
"""Name and help of every metric; durations in seconds. `docs/operations.md` lists the same."""

GAUGES: dict[str, str] = {
    "headrace_queue_requests": "sum",
    "headrace_replies_held": "sum",
    "headrace_feature_queue_requests": "sum",
    "headrace_feature_store_readable": "min",
    "headrace_feature_store_held_off": "max",
    "headrace_registry_readable": "min",
    "headrace_rpc_open_calls": "sum",
    "headrace_rpc_open_streams": "sum",
    "headrace_stream_queue_bytes": "sum",
    "headrace_stream_connected": "min",
    "headrace_skew_log_queue_bytes": "sum",
    "headrace_workers": "sum",
    "headrace_workers_ready": "sum",
}
"""How the gauges of several workers become one: the worst of what is or is not, or the sum."""
