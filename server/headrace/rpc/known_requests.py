"""What is known of a `ModelInfer` request because one like it came before.

A client sends the same message over and over with other numbers in it. Once such a message has been
parsed and checked, a later one that differs from it only inside its tensors' raw bytes and its id
needs neither: comparing the constant bytes, field tags and lengths among them, proves that a parser
would find the same fields in the same places. A look-up costs a tenth of parsing and checking.

Only fixed-width tensors sent raw qualify: their contents need no check once their size is right.
Parameters are constant bytes like others, once they have come twice as they are: a number that is
another in each request is left to the parser.
Source: Protocol Buffers documentation, "Encoding" (tag, length, payload).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

from headrace.catalog import Catalog
from headrace.predict import ServedModel
from headrace.tensors import CheckedInputs, GivenTensor
from headrace.wire import delimited, tag

LEARNED_BYTES_MAX = 16_384
"""In a larger message the tensors outweigh what could be saved."""

SIZES_MAX = 512
"""Message sizes remembered; four requests and one's parameters of each: 40 MiB at the worst."""

REQUESTS_PER_SIZE_MAX = 4

_ID = tag(service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["id"].number)
_RAW = tag(service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number)


class KnownRequest(NamedTuple):
    """
    A request without its id and its tensors' bytes.

    Args:
        model: Who answers it.
        rows: As `CheckedInputs.rows`.
        trailing: As `CheckedInputs.trailing`.
        selection: Requested outputs, by position.
        queued: Its priority and timeout, as `Request` has them; None where it names neither.
        head: The message's first bytes, constant.
        more: Further constant bytes, by where they start.
        id_span: Where the id is; None when it has none.
        raw_spans: Where the tensors' bytes are, in signature order.
    """

    model: ServedModel
    rows: int
    trailing: tuple[tuple[int, ...], ...]
    selection: tuple[int, ...]
    queued: tuple[int, float] | None
    head: bytes
    more: tuple[tuple[int, bytes], ...]
    id_span: tuple[int, int] | None
    raw_spans: tuple[tuple[int, int], ...]


class KnownRequests:
    """
    The requests known for one catalog; bounded, and safe to use from several threads.

    Args:
        catalog: Where `KnownRequest.model` was found. Another catalog needs another object.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._by_size: dict[int, tuple[KnownRequest, ...]] = {}
        self._parameters: dict[int, list[tuple[str, bytes]]] = {}  # the last ones, by size

    def find(self, message: bytes) -> KnownRequest | None:
        """Find what is known of a message that nobody has parsed yet."""
        for known in self._by_size.get(len(message), ()):
            if message.startswith(known.head) and (
                not known.more or _match(message, known.more)  # rarely: two tensors, or an id
            ):
                span = known.id_span
                # An id that is not ASCII may not be UTF-8 either: the parser decides.
                if span is None or message[span[0] : span[1]].isascii():
                    return known
        return None

    def learn(
        self,
        message: bytes,
        request: Any,
        model: ServedModel,
        given: Sequence[GivenTensor],
        checked: CheckedInputs,
        selection: tuple[int, ...],
        queued: tuple[int, float] | None = None,
    ) -> None:
        """
        Remember a request that was parsed and checked, if it qualifies.

        A size that is seen for the first time is only noted, and so are parameters, so that
        messages which never repeat cost little.
        """
        size = len(message)
        if size > LEARNED_BYTES_MAX or not request.raw_input_contents:
            return
        before = self._by_size.get(size)
        if before is None:
            if len(self._by_size) >= SIZES_MAX:
                self._by_size.clear()
                self._parameters.clear()
            self._by_size[size] = ()
            return
        if request.parameters and not self._has_come(size, request.parameters):
            return
        known = _generalize(message, request, model, given, checked, selection, queued)
        if known is not None:
            self._by_size[size] = (known, *before[: REQUESTS_PER_SIZE_MAX - 1])

    def _has_come(self, size: int, parameters: Any) -> bool:
        """Note parameters; say whether the last ones with a message of that size were the same."""
        before = self._parameters.get(size)
        now = self._parameters[size] = sorted(
            [(name, value.SerializeToString()) for name, value in parameters.items()]
        )
        return now == before


def _match(message: bytes, pieces: Sequence[tuple[int, bytes]]) -> bool:
    return all(message.startswith(piece, start) for start, piece in pieces)


def _generalize(
    message: bytes,
    request: Any,
    model: ServedModel,
    given: Sequence[GivenTensor],
    checked: CheckedInputs,
    selection: tuple[int, ...],
    queued: tuple[int, float] | None,
) -> KnownRequest | None:
    """Find where the id and the tensors are; None when a later message may need a closer look."""
    places = {tensor.name: i for i, tensor in enumerate(given)}
    order = [places[spec.name] for spec in model.signature.inputs]
    # A raw that came out of the check as it went in, fixed in width, needed nothing but its size.
    if not all(
        spec.itemsize and raw is given[i].raw
        for spec, raw, i in zip(model.signature.inputs, checked.raws, order, strict=True)
    ):
        return None
    # In the order in which every protobuf library writes it, nothing occurs twice or elsewhere.
    if request.SerializeToString() != message:
        return None
    spans: list[tuple[int, int]] = []
    if request.id:
        first = service_pb2.ModelInferRequest(
            model_name=request.model_name, model_version=request.model_version
        ).SerializeToString()
        id_field = delimited(_ID, request.id.encode())
        if not message.startswith(id_field, len(first)):
            return None
        id_stop = len(first) + len(id_field)
        spans.append((id_stop - len(request.id.encode()), id_stop))
    raw_fields = [delimited(_RAW, tensor.raw) for tensor in given]
    if not message.endswith(b"".join(raw_fields)):
        return None
    stop = len(message) - sum(map(len, raw_fields))
    raw_spans = []
    for tensor, field in zip(given, raw_fields, strict=True):
        stop += len(field)
        raw_spans.append((stop - len(tensor.raw), stop))
    spans += raw_spans
    pieces, position = [], 0
    for start, stop in spans:
        pieces.append((position, message[position:start]))
        position = stop
    return KnownRequest(
        model=model,
        rows=checked.rows,
        trailing=checked.trailing,
        selection=selection,
        queued=queued,
        head=pieces[0][1],
        more=tuple(pieces[1:]),
        id_span=spans[0] if request.id else None,
        raw_spans=tuple([raw_spans[i] for i in order]),
    )
