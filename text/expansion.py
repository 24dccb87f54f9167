"""To what size a compressed file expands, without expanding it: a small file can hold more than fits into memory."""

import os
from pathlib import Path
from typing import BinaryIO

from text.files import compression

SMALL_FILE = 1 << 24  # bytes; a compressed file of which all can be looked into before it is read
GZ_MOST = 1032  # times, by the format
ZST_MAGIC, ZST_SKIPPED = 0xFD2FB528, 0x184D2A50
ZST_BLOCK = 1 << 17  # bytes, the most that a block expands to


def most_expanded(file: str) -> int:
    """Returns the most bytes that a compressed file may expand to, or 0 if it is not compressed, or is damaged, or the
    file is large and does not say.
    """
    size = os.path.getsize(file)
    with open(file, "rb", buffering=0) as opened:
        match compression(Path(file)):
            case ".gz":
                return _of_gz(opened, size)
            case ".zst":
                return _of_zst(opened, size)
    return 0


def _of_gz(file: BinaryIO, size: int) -> int:
    """Reads the last four bytes: to what size it expands, or its last part does, modulo 4 GiB."""
    if size < 4:
        return 0
    file.seek(-4, os.SEEK_END)
    expanded = _number(file.read(4))
    is_unknown = expanded < size <= SMALL_FILE  # several parts, or more than 4 GiB
    return GZ_MOST * size if is_unknown else expanded


def _of_zst(file: BinaryIO, size: int) -> int:
    """Adds up the frames (RFC 8878), by their blocks where a frame does not record its size. Of a large file only the
    first frame's header is read.
    """
    expanded = 0
    while len(magic := file.read(4)) == 4:
        if _number(magic) & ~0xF == ZST_SKIPPED:
            file.seek(_number(file.read(4)), os.SEEK_CUR)
            continue
        if _number(magic) != ZST_MAGIC:
            break
        recorded, has_checksum = _frame_header(file)
        if size > SMALL_FILE:
            return recorded or 0
        by_blocks = _pass_blocks(file) * ZST_BLOCK
        expanded += by_blocks if recorded is None else min(recorded, by_blocks)
        file.seek(4 * has_checksum, os.SEEK_CUR)
    return expanded


def _frame_header(file: BinaryIO) -> tuple[int | None, bool]:
    """Returns the size of a frame, if it is recorded, and whether a checksum follows its blocks."""
    flags = _number(file.read(1))
    is_single, has_checksum, code = bool(flags & 0x20), bool(flags & 4), flags >> 6
    file.read((not is_single) + (0, 1, 2, 4)[flags & 3])  # window and dictionary
    n_bytes = (int(is_single), 2, 4, 8)[code]
    return (_number(file.read(n_bytes)) + 256 * (n_bytes == 2) if n_bytes else None), has_checksum


def _pass_blocks(file: BinaryIO) -> int:
    """Returns the number of blocks up to the last one of a frame, which are passed over."""
    blocks = 0
    while len(header := file.read(3)) == 3:
        blocks += 1
        is_last, kind, n_bytes = _number(header) & 1, _number(header) >> 1 & 3, _number(header) >> 3
        file.seek(1 if kind == 1 else n_bytes, os.SEEK_CUR)  # one byte that is repeated
        if is_last:
            break
    return blocks


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
