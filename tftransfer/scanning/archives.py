"""Judge ZIP archives: the names in them, what they claim to hold, and whether their two tables of contents agree."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from tftransfer.scanning.files import code_problem
from tftransfer.scanning.finding import Problems

MOST_MEMBERS = 10_000

BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 100
"""A member is a bomb if it unpacks to more than so many bytes, and to more than so many times its size."""

_HEADER = struct.Struct("<4s5H3I2H")  # of a member, where its data begins
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8  # flags
_SECOND_NAME = 0x7075  # an extra field, which newer readers take for the name
_IN_EXTRA_FIELD = 0xFFFFFFFF  # a size that is too large for its place
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """An archive in an open file, with each member's place in that.

    Args:
        file: The file; it stays open.

    Raises:
        zipfile.BadZipFile: If it is no archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._zip = zipfile.ZipFile(file)
        self.members = self._zip.infolist()

    def read(self, name: str, limit: int) -> bytes:
        """Return a member's content, at most `limit` bytes of it."""
        with self._zip.open(name) as member:
            return member.read(limit)

    def open(self, name: str, limit: int) -> BinaryIO:
        """Open a member for reading at any place: a window of the file, or unpacked into memory up to `limit` bytes."""
        member = self._zip.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            return io.BytesIO(self.read(name, limit))
        return io.BufferedReader(_Window(self.file, _data_begins(self.file, member), member.file_size))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        super().__init__()
        self._file, self._begin, self._size, self._place = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._begin + self._place)
        content = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def archive_problems(archive: Archive) -> Problems:
    """Yield what is wrong with an archive as such, whatever it holds."""
    if len(archive.members) > MOST_MEMBERS:
        yield "", f"{len(archive.members)} members: more than {MOST_MEMBERS}"
        return
    names: set[str] = set()
    for member in archive.members:
        yield from ((member.filename, problem) for problem in _member_problems(member))
        if member.filename in names:
            yield member.filename, "is there twice"
        names.add(member.filename)
    problems = list(_layout_problems(archive))
    yield from problems
    if not problems:
        yield from _code_problems(archive)


def _member_problems(member: zipfile.ZipInfo) -> Iterator[str]:
    mode = member.external_attr >> 16
    if not (is_plain(member.orig_filename) and is_plain(member.filename)):
        yield "leads out of the archive's folder"
    if _SECOND_NAME in _extra_fields(member.extra):
        yield "has two names"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield "is a link or no ordinary file"
    if member.flag_bits & _ENCRYPTED:
        yield "is encrypted"
    elif member.compress_type not in _PACKINGS:
        yield f"is packed in a way that Keras does not use (method {member.compress_type})"
    elif _is_bomb(member):
        yield f"claims {member.file_size} bytes and holds {member.compress_size}"


def _extra_fields(extra: bytes) -> Iterator[int]:
    """Yield the kinds of a member's extra fields."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        yield kind
        extra = extra[4 + size :]


def _code_problems(archive: Archive) -> Problems:
    for member in archive.members:
        readable = not member.flag_bits & _ENCRYPTED and member.compress_type in _PACKINGS
        head = archive.read(member.filename, 8) if readable else b""
        if problem := code_problem(member.filename, head):
            yield member.filename, problem


def is_plain(name: str) -> bool:
    """Tell whether a path stays below where it is put, on any system.

    Example:
        >>> is_plain("assets/vocabulary.txt"), is_plain("../x"), is_plain("C:\\\\x")
        (True, False, False)
    """
    path = PurePosixPath(name)
    return bool(name) and not (path.is_absolute() or ".." in path.parts or any(char in name for char in "\\:\0"))


def _is_bomb(member: zipfile.ZipInfo) -> bool:
    return member.file_size > BOMB_BYTES and member.file_size > BOMB_RATIO * max(1, member.compress_size)


def _layout_problems(archive: Archive) -> Problems:
    """Compare the headers before the data with the table at the end, and look for data that members share."""
    end = 0
    for member in sorted(archive.members, key=lambda one: one.header_offset):
        problem = _header_problem(archive.file, member)
        if problem:
            yield member.filename, problem
            continue
        if member.header_offset < end:
            yield member.filename, "shares its data with another member"
        if not end and member.header_offset:
            yield "", f"{member.header_offset} bytes lie before the archive"
        end = _data_begins(archive.file, member) + member.compress_size
    if end > archive.file.seek(0, io.SEEK_END):
        yield "", "ends before its members do"


def _header_problem(file: BinaryIO, member: zipfile.ZipInfo) -> str | None:
    file.seek(member.header_offset)
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(_SIGNATURE):
        return "has no header where it should begin"
    _, _, flags, packing, _, _, _, packed, size, name_length, _ = _HEADER.unpack(raw)
    if file.read(name_length) != _encoded(member):
        return "has another name in its header than in the table at the end"
    sizes = {(member.compress_size, member.file_size)} | ({(0, 0)} if flags & _SIZES_FOLLOW else set())
    if packing != member.compress_type:
        return "is packed otherwise in its header than in the table at the end"
    if _IN_EXTRA_FIELD not in (packed, size) and (packed, size) not in sizes:
        return "has other sizes in its header than in the table at the end"
    return None


def _encoded(member: zipfile.ZipInfo) -> bytes:
    return member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")


def _data_begins(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset)
    header = _HEADER.unpack(file.read(_HEADER.size))
    return member.header_offset + _HEADER.size + header[-2] + header[-1]
