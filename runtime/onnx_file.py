"""Where an ONNX file keeps its weights: read and replaced without the onnx package.

A weight that lies in another file is a TensorProto with `external_data` entries (location, offset,
length, and onnxruntime's prepacked_*). Only those are taken apart here; every other byte of the
model is copied as it is. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Entries = dict[str, str]  # the external_data of one tensor

_GRAPH, _INITIALIZER = 7, 5  # ModelProto.graph, GraphProto.initializer
_NAME, _EXTERNAL = 8, 13  # TensorProto.name, .external_data
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def external_data(model: bytes) -> dict[str, Entries]:
    """Name -> external_data of every initializer of the main graph that lies in another file.

    Raises:
        ValueError: the bytes are not an ONNX model.
    """
    found: dict[str, Entries] = {}
    for number, graph, _ in _fields(memoryview(model)):
        for inner, tensor, _ in _fields(graph) if number == _GRAPH else ():
            if inner == _INITIALIZER:
                name, entries = _tensor(tensor)
                if entries:
                    found[name] = entries
    return found


def replace_external_data(model: bytes, entries: Mapping[str, Entries]) -> bytes:
    """The model with the external_data of every initializer that has some taken from `entries`.

    Raises:
        KeyError: an initializer lies in another file and `entries` does not know it.
        ValueError: the bytes are not an ONNX model.
    """

    def tensor(raw: memoryview) -> bytes:
        name, old = _tensor(raw)
        if not old:
            return bytes(raw)
        kept = [bytes(field) for number, _, field in _fields(raw) if number != _EXTERNAL]
        new = [
            _record(_EXTERNAL, _record(_KEY, key.encode()) + _record(_VALUE, value.encode()))
            for key, value in entries[name].items()
        ]
        return b"".join(kept + new)

    def graph(raw: memoryview) -> bytes:
        return b"".join(
            _record(number, tensor(value)) if number == _INITIALIZER else bytes(field)
            for number, value, field in _fields(raw)
        )

    return b"".join(
        _record(number, graph(value)) if number == _GRAPH else bytes(field)
        for number, value, field in _fields(memoryview(model))
    )


def _tensor(raw: memoryview) -> tuple[str, Entries]:
    name, entries = "", {}
    for number, value, _ in _fields(raw):
        if number == _NAME:
            name = bytes(value).decode()
        elif number == _EXTERNAL:
            pair = {n: bytes(v).decode() for n, v, _ in _fields(value)}
            entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    return name, entries


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(field number, content, whole field with its tag) of a protobuf message, in order."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == _VARINT:
            _, end = _varint(message, at)
        elif wire == _BYTES:
            length, at = _varint(message, at)
            end = at + length
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if end > len(message):
            raise ValueError(f"a field ends at byte {end} of {len(message)}")
        yield tag >> 3, message[at:end], message[start:end]
        at = end


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"a number is cut off at byte {at}")


def _record(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _BYTES) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
