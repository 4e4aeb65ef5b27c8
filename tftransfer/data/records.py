"""TFRecord files, record by record: which are whole, and which number a damaged one has.

TensorFlow's own reader ends at the first damaged record, or drops all that follow it. Each record is stored as its
length (8 bytes, little-endian), the masked CRC-32C of that, its data, and the masked CRC-32C of the data.

Source: TensorFlow, `tensorflow/core/lib/io/record_writer.h`; Castagnoli et al. 1993, "Optimization of Cyclic
Redundancy-Check Codes with 24 and 32 Parity Bits" (the polynomial).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits from low to high
_MASK = 0xA282EAD8
_HEADER, _FOOTER = 12, 4  # bytes around the data


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Args:
        number: Its place in the file, from 0.
        data: What it holds; None if that is damaged.
        problem: What is wrong with it. Defaults to nothing.
    """

    number: int
    data: bytes | None
    problem: str = ""


def records(path: Path, expected: int | None = None) -> Iterator[Record]:
    """Read the records of a file, the damaged ones too.

    One whose data are damaged is followed by the next; behind a damaged length no record can be found.

    Args:
        path: A TFRecord file that is not compressed.
        expected: How many records there should be; those that cannot be found are then given one by one. Defaults to
            None: not known.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "two.tfrecord"
        >>> _ = file.write_bytes(framed(b"first") + framed(b"second")[:-1])
        >>> [(record.number, record.problem) for record in records(file, expected=3)]
        [(0, ''), (1, 'the file ends within this record'), (2, 'missing: the file ends before it')]
    """
    number, why = 0, "missing: the file ends before it"
    with open(path, "rb") as file:
        while header := file.read(_HEADER):
            length = int.from_bytes(header[:8], "little")
            if len(header) == _HEADER and masked_crc(header[:8]) != int.from_bytes(header[8:], "little"):
                yield Record(number, None, "its length is damaged")
                number, why = number + 1, "cannot be found: the length of a record before it is damaged"
                break
            body = file.read(length + _FOOTER) if len(header) == _HEADER else b""
            if len(body) < length + _FOOTER or len(header) < _HEADER:
                yield Record(number, None, "the file ends within this record")
                number += 1
                break
            is_whole = masked_crc(body[:length]) == int.from_bytes(body[length:], "little")
            yield Record(number, body[:length]) if is_whole else Record(number, None, "its data are damaged")
            number += 1
    yield from (Record(lost, None, why) for lost in range(number, expected or 0))


def framed(data: bytes) -> bytes:
    """Return one record as it is stored.

    Example:
        >>> framed(b"").hex(" ", 4)
        '00000000 00000000 29039807 d8ea82a2'
    """
    length = len(data).to_bytes(8, "little")
    return b"".join((length, masked_crc(length).to_bytes(4, "little"), data, masked_crc(data).to_bytes(4, "little")))


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of some bytes, turned and shifted as TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Compute the CRC-32C (Castagnoli) of some bytes, at some 30 MB/s.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    # The register starts with ones, as if the first four bytes were inverted; zeros before them change nothing.
    if len(data) < 4 * _HEADER:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = _numbers()[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    # Lanes of equal length side by side, and then each after the one before.
    lanes = math.isqrt(len(data))
    length = -(-len(data) // lanes)
    rows = np.zeros(lanes * length, np.uint8)
    rows[-len(data) :] = np.frombuffer(data, np.uint8)
    rows[-len(data) : len(rows) - len(data) + 4] ^= 255
    found = _advanced(np.zeros(lanes, np.uint32), rows.reshape(lanes, length))
    shift = _shifting(length)
    crc = 0
    for lane in found.tolist():
        crc = shift[0][crc & 255] ^ shift[1][crc >> 8 & 255] ^ shift[2][crc >> 16 & 255] ^ shift[3][crc >> 24] ^ lane
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """Return what each byte does to the register, `(256,)` uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@cache
def _numbers() -> list[int]:
    return _table().tolist()


def _advanced(crcs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return registers `(n,)` after each has read its row of `(n, length)`."""
    table = _table()
    for column in np.ascontiguousarray(rows.T):
        crcs = table[(crcs ^ column) & 255] ^ crcs >> 8
    return crcs


@cache
def _shifting(length: int) -> list[list[int]]:
    """Return, for each byte of a register, what becomes of it after so many zeros."""
    registers = (np.arange(256, dtype=np.uint32)[None] << np.array([[0], [8], [16], [24]], np.uint32)).ravel()
    return _advanced(registers, np.zeros((len(registers), length), np.uint8)).reshape(4, 256).tolist()
