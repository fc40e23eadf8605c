"""A request with more rows than a batch holds: its parts wait and run as requests of their own.

The caller has one answer with one prediction id, when all parts are there. One part that fails
fails the whole; the others leave the queue at once, and so do all when the caller leaves.
"""

import threading
from collections.abc import Sequence

import numpy as np

from headrace.batching.batcher import Batcher
from headrace.errors import BackendError, ServingError
from headrace.features.store import FeatureRows
from headrace.request import AnsweredBatch, OutputBlock, Request, StandIn
from headrace.tensors import Signature, cut


class RequestPart(StandIn):
    """
    Some rows of a request that was split. Nobody but its `SplitRequest` is told.

    Args:
        whole: What it is a part of.
        split: Puts the answers together.
        index: Which part it is.
        first_row: The row of the whole request with which it begins.
        raws: Its rows of each input.
        rows: How many.
    """

    __slots__ = ("_index", "ends_whole", "first_row", "number", "split")

    def __init__(
        self,
        whole: Request,
        split: "SplitRequest",
        index: int,
        first_row: int,
        raws: tuple[memoryview, ...],
        rows: int,
    ) -> None:
        super().__init__(whole, rows, raws, sum([len(raw) for raw in raws]))
        self.split = split
        self.number = split.number
        self.first_row = first_row
        self.ends_whole = False
        self._index = index

    @property
    def caller_rows(self) -> int:
        return self.split.rows

    @property
    def parts(self) -> "Sequence[RequestPart]":
        return self.split.parts

    def expired(self, now_s: float) -> bool:
        return self.split.expired(now_s)

    def left_early(self) -> bool:
        return self.split.left_early()

    def answer(self, batch: AnsweredBatch, start: int, prediction_id: str) -> None:  # noqa: ARG002
        self.ends_whole = self.split.take(self._index, batch, start)

    def fail(self, error: ServingError) -> None:
        whole = self.split.end()
        if whole is not None:
            self.ends_whole = True
            whole.fail(error)

    def drop(self) -> None:
        whole = self.split.end()
        if whole is not None:
            self.ends_whole = True
            self.drop_for()(whole)


class SplitRequest:
    """
    Puts the answers to the parts of a request together. Any thread may call it.

    It ends once: when the request is answered, failed, dropped or left, whichever comes first.

    Args:
        request: With more rows than a batch holds; checked.
        signature: What it was checked against.
        batcher: Where its parts will wait.
        number: Its request number.
        prediction_id: What is made of it.
    """

    __slots__ = (
        "_batcher",
        "_lock",
        "_pieces",
        "_unanswered",
        "_whole",
        "is_given_up",
        "number",
        "parts",
        "prediction_id",
        "rows",
    )

    def __init__(
        self,
        request: Request,
        signature: Signature,
        batcher: Batcher[Request],
        number: int,
        prediction_id: str,
    ) -> None:
        most = signature.max_batch_size
        self.number = number
        self.prediction_id = prediction_id
        self.rows = request.rows
        self._batcher = batcher
        self._lock = threading.Lock()
        self._whole: Request | None = request
        self.is_given_up = False
        """Whether a part left the queue unserved; then no other is run."""
        cuts = [
            cut(spec, raw, request.rows, most)
            for spec, raw in zip(signature.inputs, request.raws, strict=True)
        ]
        self.parts: Sequence[RequestPart] = [
            RequestPart(request, self, i, i * most, raws, min(most, request.rows - i * most))
            for i, raws in enumerate(zip(*cuts, strict=True))
        ]
        """What waits for batches; none after the end."""
        self._pieces: list[tuple[AnsweredBatch, int, int] | None] = [None] * len(self.parts)
        self._unanswered = len(self.parts)
        request.waits_in = self

    def expired(self, now_s: float) -> bool:
        """Say whether nobody waits for the parts any more."""
        whole = self._whole
        return whole is None or self.is_given_up or whole.expired(now_s)

    def left_early(self) -> bool:
        """Say whether the caller gave up although there was time left; given up is not gone."""
        whole = self._whole
        return whole is not None and whole.left_early()

    def give_up(self) -> bool:
        """
        Note that a part left the queue unserved, of which `drop` will tell; under the queue's lock.

        Returns:
            Whether the request is lost by that, and was not before.
        """
        was_given_up, self.is_given_up = self.is_given_up, True
        return self._whole is not None and not was_given_up

    def leave(self, _request: Request) -> bool:
        """Let go of all parts; say whether the request is still to be answered, by the caller."""
        return self.end(counts_as_dropped=True) is not None

    def take(self, index: int, batch: AnsweredBatch, start: int) -> bool:
        """
        Take the answer to a part: rows of `batch` from `start` on.

        Returns:
            Whether it was the last one, and the whole request has been answered.

        Raises:
            BackendError: the answers do not fit together. The request is not answered.
        """
        with self._lock:
            if self._whole is None:
                return False
            self._pieces[index] = batch, start, start + self.parts[index].rows
            self._unanswered -= 1
            if self._unanswered:
                return False
            whole, pieces = self._whole, [piece for piece in self._pieces if piece is not None]
        whole.answer(_put_together(pieces), 0, self.prediction_id)
        return self.end() is not None

    def end(self, *, counts_as_dropped: bool = False) -> Request | None:
        """
        End, if that has not happened yet, and take what still waits out of the queue.

        Returns:
            Who is to be told; None when it had ended before.
        """
        with self._lock:
            whole, self._whole = self._whole, None
            parts, self.parts = self.parts, ()
            self._pieces = []
        if whole is None:
            return None
        whole.waits_in = None  # it leads back here: references alone would not free either
        self._batcher.withdraw(parts, counts_as_dropped=counts_as_dropped and not self.is_given_up)
        return whole


def _put_together(pieces: Sequence[tuple[AnsweredBatch, int, int]]) -> AnsweredBatch:
    """
    Make one answered batch of rows of several, in order.

    Of the features there are values, statuses and times, as replies need them.

    Raises:
        BackendError: an output differs in shape.
    """
    batches = [batch for batch, _, _ in pieces]
    first, last = batches[0], batches[-1]
    if any(batch.output_shapes != first.output_shapes for batch in batches):
        raise BackendError(
            f"model '{first.model.name}' returned outputs of different shapes for parts of one "
            "request; send no more rows than fit one batch"
        )
    outputs = [
        OutputBlock(
            block.spec,
            np.concatenate([batch.outputs[i].rows(start, stop) for batch, start, stop in pieces]),
        )
        for i, block in enumerate(first.outputs)
    ]
    return AnsweredBatch(
        model=first.model,
        outputs=tuple(outputs),
        join=first.join,
        features=_features(pieces, last.now_s),
        missing_per_row=_counts([(b.missing_per_row, start, stop) for b, start, stop in pieces]),
        stale_per_row=_counts([(b.stale_per_row, start, stop) for b, start, stop in pieces]),
        output_shapes=first.output_shapes,
        started_s=min([batch.started_s for batch in batches]),
        features_s=sum([batch.features_s for batch in batches]),
        infer_s=sum([batch.infer_s for batch in batches]),
        inferred_s=max([batch.inferred_s for batch in batches]),
        now_s=last.now_s,
    )


def _counts(pieces: Sequence[tuple[list[int] | None, int, int]]) -> list[int] | None:
    if any(counts is None for counts, _, _ in pieces):
        return None
    return [n for counts, start, stop in pieces if counts is not None for n in counts[start:stop]]


def _features(pieces: Sequence[tuple[AnsweredBatch, int, int]], now_s: float) -> FeatureRows | None:
    found = [
        (rows, batch.now_s, start, stop)
        for batch, start, stop in pieces
        if (rows := batch.features) is not None
    ]
    if len(found) < len(pieces):
        return None
    return FeatureRows(
        blocks={
            dtype: np.concatenate(
                [rows.blocks[dtype][start:stop] for rows, _, start, stop in found]
            )
            for dtype in found[0][0].blocks
        },
        statuses=np.concatenate(
            [rows.statuses[:, start:stop] for rows, _, start, stop in found], axis=1
        ),
        # Ages are told relative to one time; each is what it was when the part was read.
        event_times_s=np.concatenate(
            [
                rows.event_times_s[:, start:stop] + (now_s - read_s)
                for rows, read_s, start, stop in found
            ],
            axis=1,
        ),
        matrix=None,
        block_columns=found[0][0].block_columns,
    )
