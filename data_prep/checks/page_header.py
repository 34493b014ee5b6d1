"""Tells whether a Parquet page has a checksum, which pyarrow verifies but does not show."""

from typing import Any, BinaryIO

# Of Thrift's compact protocol: a field whose number is one more than the last, of type i32.
_NEXT_I32 = 0x15


def has_checksum(file: BinaryIO, column: Any) -> bool:
    """Whether the first page of a column chunk (its pyarrow metadata) has a CRC-32.

    A page's header begins with its type, its uncompressed and its compressed size. The optional
    `crc` is the next field: https://parquet.apache.org/docs/file-format/data-pages/checksumming/.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    file.seek(start)
    data = file.read(32)
    place = 0
    for _ in range(3):
        if data[place : place + 1] != bytes([_NEXT_I32]):
            return False
        place += 1
        while data[place : place + 1] >= b"\x80":  # a varint goes on
            place += 1
        place += 1
    return data[place : place + 1] == bytes([_NEXT_I32])
