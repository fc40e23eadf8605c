"""What a tensor on the wire must look like. Pure: no clock, no I/O, no protobuf.

A request's input is kept as the raw bytes it came in until its batch is formed: raw tensors of
equal trailing shape concatenate into the batch's raw tensor, for every datatype including BYTES, so
one `join` does per batch what would otherwise be done per request.

Source: Open Inference Protocol, "Tensor Data" (row-major, little-endian; BYTES elements are a
4-byte little-endian length and the bytes; BOOL is one byte), with Triton's message texts, which
clients search for.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidTensor

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
"""Every OIP datatype and the numpy dtype that holds it. BF16, Triton's extension, has none."""

MAX_ELEMENTS = 2**40
"""Above any message limit; keeps products of hostile shapes small and exact."""

BYTES_ELEMENTS_MAX = 1 << 17
"""In one input. They are walked one by one where all calls come in: so many take some 40 ms."""

KNOWN_INPUTS_MAX = 1_024
"""Input shapes that one signature remembers."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """
    One input or output that a model declares.

    Args:
        name: As in the model.
        datatype: A key of `NUMPY_DTYPES`.
        shape: −1 where any size is accepted; the batch dimension, where there is one, is first.
        is_column: One value per row. The caller may send shape `[n]` or `[n,1]`.
        widens_int32: INT32 is accepted for this INT64 column, and widened (an entity join key).
        is_text: The BYTES must be UTF-8.
        element_bytes_max: Longest BYTES element; 0 for no limit.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_column: bool = False
    widens_int32: bool = False
    is_text: bool = False
    element_bytes_max: int = 0
    itemsize: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.datatype not in NUMPY_DTYPES:
            raise ValueError(f"datatype '{self.datatype}' is not supported")
        object.__setattr__(
            self,
            "itemsize",
            0 if self.datatype == "BYTES" else NUMPY_DTYPES[self.datatype].itemsize,
        )

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return NUMPY_DTYPES[self.datatype]


class GivenTensor(NamedTuple):
    """One input as a caller sent it; `raw` is not yet known to fit `datatype` and `shape`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


class CheckedInputs(NamedTuple):
    """
    A request's inputs after `Signature.check`.

    Args:
        rows: Rows of the request; 1 when the model does not batch.
        raws: One per signature input, in its order.
        trailing: Per input, the shape after the batch dimension (the whole shape when the model
            does not batch). Requests batch together only when these are equal.
    """

    rows: int
    raws: tuple[bytes | memoryview, ...]
    trailing: tuple[tuple[int, ...], ...]


class _KnownInput(NamedTuple):
    rows: int
    raw_size: int
    trailing: tuple[int, ...]


class Signature:
    """
    What a model accepts and returns, as its callers see it.

    Args:
        model: The name used in messages.
        inputs: In the order in which `CheckedInputs.raws` come.
        outputs: In reply order.
        max_batch_size: Most rows in one batch; 0 when the model has no batch dimension.
        max_request_rows: Most rows in one request, which is split if need be; no more than in a
            batch when that is more.
    """

    def __init__(
        self,
        model: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        max_batch_size: int,
        max_request_rows: int = 0,
    ) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.max_batch_size = max_batch_size
        self.max_request_rows = max(max_batch_size, max_request_rows)
        self._index = {spec.name: i for i, spec in enumerate(self.inputs)}
        self._output_index = {spec.name: i for i, spec in enumerate(self.outputs)}
        self._all_outputs = tuple(range(len(self.outputs)))
        # What `_check_one` found for fixed-width inputs of one name, datatype and shape: most
        # requests of a caller look alike, and one look-up then replaces the checks.
        self._known: dict[tuple[str, str, tuple[int, ...]], _KnownInput] = {}

    def check(self, given: Sequence[GivenTensor]) -> CheckedInputs:
        """
        Check a request's inputs against the signature.

        Raises:
            InvalidTensor: a missing, extra or repeated input; a wrong datatype, rank or dimension;
                no rows or too many; bytes that do not fit the shape.
        """
        if len(given) == 1 and len(self.inputs) == 1 and given[0].name == self.inputs[0].name:
            rows, raw, trailing = self._check_one(self.inputs[0], given[0])
            return CheckedInputs(rows, (raw,), (trailing,))
        ordered: list[GivenTensor | None] = [None] * len(self.inputs)
        for tensor in given:
            i = self._index.get(tensor.name)
            if i is None:
                raise self._unexpected(tensor.name)
            if ordered[i] is not None:
                raise InvalidTensor(f"input '{tensor.name}' already exists in request")
            ordered[i] = tensor
        if len(given) != len(self.inputs):
            raise self._missing(given)
        raws: list[bytes] = []
        trailings: list[tuple[int, ...]] = []
        rows = -1
        for spec, tensor_or_none in zip(self.inputs, ordered, strict=True):
            assert tensor_or_none is not None
            own_rows, raw, trailing = self._check_one(spec, tensor_or_none)
            if rows not in (-1, own_rows):
                raise InvalidTensor(
                    f"input '{spec.name}' batch size does not match other inputs for '{self.model}'"
                )
            rows = own_rows
            raws.append(raw)
            trailings.append(trailing)
        return CheckedInputs(max(rows, 1), tuple(raws), tuple(trailings))

    def check_head(self, name: str, datatype: str, shape: tuple[int, ...]) -> int:
        """
        Check an input by what it says of itself, before its values are converted.

        Returns:
            How many elements it must have.

        Raises:
            InvalidTensor: an unknown input; a wrong datatype, rank or dimension; no rows or too
                many.
        """
        i = self._index.get(name)
        if i is None:
            raise self._unexpected(name)
        _, shape = self._check_type_and_shape(self.inputs[i], datatype, shape)
        return math.prod(shape)

    def check_outputs(self, names: Sequence[str]) -> tuple[int, ...]:
        """
        Resolve requested outputs to their positions.

        Args:
            names: As requested; empty asks for all.

        Raises:
            InvalidTensor: an output the model does not have, or one asked for twice.
        """
        if not names:
            return self._all_outputs
        for name in names:
            if name not in self._output_index:
                raise InvalidTensor(
                    f"unexpected inference output '{name}' for model '{self.model}'"
                )
        if len(set(names)) != len(names):
            raise InvalidTensor(f"an output is requested twice for model '{self.model}'")
        return tuple(self._output_index[name] for name in names)

    def _check_one(
        self, spec: TensorSpec, given: GivenTensor
    ) -> tuple[int, bytes, tuple[int, ...]]:
        raw, shape = given.raw, given.shape
        known = self._known.get(given[:3])
        if known is not None and known.raw_size == len(raw):
            return known.rows, raw, known.trailing
        itemsize, shape = self._check_type_and_shape(spec, given.datatype, shape)
        count = math.prod(shape)
        if itemsize:
            if len(raw) != count * itemsize:
                raise InvalidTensor(
                    f"input byte size mismatch for input '{spec.name}' for model '{self.model}'. "
                    f"Expected {count * itemsize}, got {len(raw)}"
                )
        else:
            check_bytes(raw, count, spec.name, self.model)
            check_elements(raw, spec, self.model)
        rows, trailing = (shape[0], shape[1:]) if self.max_batch_size else (1, shape)
        if itemsize != spec.itemsize:
            raw = np.frombuffer(raw, "<i4").astype("<i8").tobytes()
        elif itemsize:
            if len(self._known) >= KNOWN_INPUTS_MAX:
                self._known.clear()
            self._known[given[:3]] = _KnownInput(rows, len(raw), trailing)
        return rows, raw, trailing

    def _check_type_and_shape(
        self, spec: TensorSpec, datatype: str, shape: tuple[int, ...]
    ) -> tuple[int, tuple[int, ...]]:
        """Return the bytes of one element (0 for BYTES) and the shape as the model has it."""
        if datatype == spec.datatype:
            itemsize = spec.itemsize
        elif spec.widens_int32 and datatype == "INT32":
            itemsize = 4
        else:
            raise InvalidTensor(
                f"inference input '{spec.name}' data-type is '{datatype}', "
                f"but model '{self.model}' expects '{spec.datatype}'"
            )
        if spec.is_column and len(shape) == 1:
            shape = (shape[0], 1)
        self._check_shape(spec, shape)
        return itemsize, shape

    def _unexpected(self, name: str) -> InvalidTensor:
        return InvalidTensor(f"unexpected inference input '{name}' for model '{self.model}'")

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        expected = spec.shape
        if len(shape) != len(expected) or any(
            want not in (-1, got) for want, got in zip(expected, shape, strict=True)
        ):
            raise InvalidTensor(
                f"unexpected shape for input '{spec.name}' for model '{self.model}'. "
                f"Expected {_listed(expected)}, got {_listed(shape)}"
            )
        # A 0 does not excuse the other dimensions: numpy refuses [0, 2**62] too.
        sizes = [dim or 1 for dim in shape] if 0 in shape else shape
        if any(dim < 0 for dim in shape) or math.prod(sizes) > MAX_ELEMENTS:
            raise InvalidTensor(
                f"shape {_listed(shape)} of input '{spec.name}' for model '{self.model}' "
                "has a negative dimension or too many elements"
            )
        if not self.max_batch_size:
            return
        if shape[0] == 0:
            raise InvalidTensor(
                f"input '{spec.name}' for model '{self.model}' has no rows; send at least one"
            )
        if shape[0] > self.max_request_rows:
            raise InvalidTensor(
                f"inference request batch-size must be <= {self.max_request_rows} for "
                f"'{self.model}'; input '{spec.name}' has {shape[0]} rows"
            )

    def _missing(self, given: Sequence[GivenTensor]) -> InvalidTensor:
        got = [tensor.name for tensor in given]
        missing = [spec.name for spec in self.inputs if spec.name not in got]
        return InvalidTensor(
            f"expected {len(self.inputs)} inputs but got {len(got)} inputs "
            f"for model '{self.model}'. Got input(s) {got}, "
            f"but missing required input(s) {missing}. Please provide all required input(s)."
        )


def join(
    spec: TensorSpec, raws: Iterable[bytes | memoryview], shape: Sequence[int]
) -> NDArray[np.generic]:
    """
    Make one read-only array of several requests' raw bytes.

    Args:
        spec: Gives the datatype.
        raws: Checked raw tensors, in row order.
        shape: Of the whole array. BYTES become an object array of `bytes`, which is writable. Any
            BOOL byte but 0 is true.
    """
    whole = b"".join(raws)
    if spec.datatype == "BYTES":
        array = np.empty(math.prod(shape), np.object_)
        array[:] = list(iterate_bytes(whole))
        return array.reshape(shape)
    if spec.datatype == "BOOL":  # a model must not see a bool of 2
        whole = (np.frombuffer(whole, np.uint8) != 0).tobytes()
    return np.frombuffer(whole, spec.dtype).reshape(shape)


def cut(spec: TensorSpec, raw: bytes | memoryview, rows: int, most: int) -> list[memoryview]:
    """
    Cut a checked raw tensor into parts of `most` rows each, the last one of what is left.

    Nothing is copied. BYTES are walked, element by element.
    """
    view = memoryview(raw)
    starts = range(0, rows, most)
    if spec.datatype != "BYTES":
        size = len(view) // rows
        return [view[start * size : (start + most) * size] for start in starts]
    ends = [0]
    while ends[-1] < len(view):
        ends.append(ends[-1] + _LENGTH.size + _LENGTH.unpack_from(view, ends[-1])[0])
    per_row = (len(ends) - 1) // rows
    return [
        view[ends[start * per_row] : ends[min(start + most, rows) * per_row]] for start in starts
    ]


def encode(array: NDArray[np.generic]) -> bytes:
    """
    Turn an array into raw wire bytes. Object and string arrays become BYTES.

    Elements of an object array are `bytes` or `str` (sent as UTF-8).
    """
    if array.dtype.kind in "OSU":
        parts = []
        for value in array.ravel().tolist():
            # Not `bytes(value)`, which makes n zeros of the number n.
            element = value.encode() if isinstance(value, str) else b"" + value
            parts.append(_LENGTH.pack(len(element)))
            parts.append(element)
        return b"".join(parts)
    return array.tobytes()


def iterate_bytes(raw: bytes) -> Iterable[bytes]:
    """Yield the elements of a well-formed raw BYTES tensor."""
    position, end = 0, len(raw)
    while position < end:
        (length,) = _LENGTH.unpack_from(raw, position)
        position += 4
        yield raw[position : position + length]
        position += length


def check_bytes(raw: bytes, count: int, name: str, model: str) -> None:
    """
    Check that `raw` is exactly `count` length-prefixed elements.

    Raises:
        InvalidTensor: a length prefix runs past the end, or the number of elements differs, or
            there are more than `BYTES_ELEMENTS_MAX`.
    """
    if count > BYTES_ELEMENTS_MAX:
        raise InvalidTensor(
            f"input '{name}' for model '{model}' has {count} BYTES elements; "
            f"at most {BYTES_ELEMENTS_MAX} are accepted in one request"
        )
    position, end, found = 0, len(raw), 0
    while position < end and found <= count:
        if end - position < 4:
            break
        position += 4 + _LENGTH.unpack_from(raw, position)[0]
        found += 1
    if position != end or found != count:
        raise InvalidTensor(
            f"input '{name}' for model '{model}' has BYTES elements whose length prefixes do not "
            f"add up to its {end} bytes and {count} elements"
        )


def check_elements(raw: bytes, spec: TensorSpec, model: str) -> None:
    """
    Check the elements of a well-formed raw BYTES tensor against what its spec asks of them.

    Raises:
        InvalidTensor: one is too long, or not UTF-8.
    """
    if not spec.is_text and not spec.element_bytes_max:
        return
    for element in iterate_bytes(raw):
        if spec.element_bytes_max and len(element) > spec.element_bytes_max:
            raise InvalidTensor(
                f"input '{spec.name}' for model '{model}' has an element of {len(element)} bytes; "
                f"at most {spec.element_bytes_max} are accepted"
            )
        if spec.is_text:
            try:
                element.decode()
            except UnicodeDecodeError:
                raise InvalidTensor(
                    f"input '{spec.name}' for model '{model}' has BYTES elements that are not UTF-8"
                ) from None


def _listed(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
