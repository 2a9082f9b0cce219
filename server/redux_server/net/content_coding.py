"""Content codings (``Content-Encoding``): which of them bodies really have, and what those hold.

For both directions: bodies that are sent to us, and answers that we fetch. Knows neither.
Source: RFC 9110, section 8.4, and the registry of HTTP content codings.
"""

import zlib
from collections.abc import Iterator
from typing import Any

PIECE_BYTES = 256 * 2**10
MAX_MEMBERS = 64
"""Of one gzip body. Programs that write several write few; a million empty ones take seconds."""
_GZIP, _DEFLATE = frozenset({"gzip", "x-gzip"}), frozenset({"deflate"})
READ = _GZIP | _DEFLATE
# What a body can really be coded with, but not here. Whatever else stands there says nothing of the
# bytes ("utf-8", "binary", "base64", "aws-chunked" and "none" are common).
_UNREAD = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz", "exi", "pack200-gzip"})


def codings(header: str) -> list[str]:
    """The codings that a body really has, in the order they were applied, by its ``header``."""
    names = (name.strip() for name in header.lower().split(","))
    return [name for name in names if name in READ | _UNREAD]


class Content:
    """What a body in ``coding``, one of ``READ``, holds, as it comes.

    gzip may have several members. "deflate" is zlib's format and often, by mistake, the bare one;
    both are read.
    """

    def __init__(self, coding: str) -> None:
        self._is_gzip = coding in _GZIP
        self._stream: Any = None
        self._members = 0
        self._start = b""

    @property
    def is_complete(self) -> bool:
        """Whether what came so far is whole. Nothing at all is."""
        return not self._start and (self._stream is None or self._stream.eof)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What ``data``, which comes next, holds: at most ``PIECE_BYTES`` at a time.

        Raises:
            zlib.error: it is not of this coding, or has more than ``MAX_MEMBERS``.
        """
        data = self._start + data
        self._start = b""
        while data:
            if self._stream is None or (self._stream.eof and self._is_gzip):
                if len(data) < 2:  # too little to tell the formats of deflate apart
                    self._start = data
                    return
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise zlib.error("too many members")
                self._stream = self._opened(data)
            if self._stream.eof:
                raise zlib.error("more after the end")
            piece = self._stream.decompress(data, PIECE_BYTES)
            data = self._stream.unused_data or self._stream.unconsumed_tail
            if piece:
                yield piece
        # What did not fit the last piece comes without more data.
        while self._stream is not None and not self._stream.eof:
            piece = self._stream.decompress(b"", PIECE_BYTES)
            if not piece:
                return
            yield piece

    def _opened(self, data: bytes) -> Any:
        if self._is_gzip:
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        has_header = data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
