"""What an ONNX file says about itself, read without a runtime, which may know less than the file needs. Free of torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from detrcli.export.description import KEY

METADATA = 14  # the field of ONNX's ModelProto with pairs of a key, field 1, and a value, field 2
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # how a field of a protobuf is written


def description_in(file: IO[bytes]) -> str | None:
    """The text under our key, None without one; a ValueError where the file is no protobuf, or ends too soon."""
    for pair in fields(file, METADATA):
        if list(fields(io.BytesIO(pair), 1)) == [KEY.encode()]:
            return b"".join(fields(io.BytesIO(pair), 2)).decode("utf-8")
    return None


def fields(file: IO[bytes], wanted: int) -> Iterator[bytes]:
    """The contents of one field of a protobuf, as often as it is there; what else there is is passed over."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not end:
        raise ValueError("it is empty")
    while file.tell() < end:
        number, form = divmod(_varint(file), 8)
        length = _length(file, form)
        if length > end - file.tell():
            raise ValueError("it ends in the middle")
        if number == wanted and form == DELIMITED:
            yield file.read(length)
        else:
            file.seek(length, io.SEEK_CUR)


def _length(file: IO[bytes], form: int) -> int:
    """Of what follows; a number is read over at once."""
    if form == VARINT:
        _varint(file)
        return 0
    if form == DELIMITED:
        return _varint(file)
    if form not in (FIXED64, FIXED32):
        raise ValueError("it is no protobuf")
    return 8 if form == FIXED64 else 4


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends in the middle")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("it is no protobuf")
