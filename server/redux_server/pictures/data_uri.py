"""Where a data URI's payload begins, in all the ways that data URIs are written.

RFC 2397 and browsers allow parameters of any kind (names with parentheses, quotes, commas), blanks
around each, and any case; forms and SDKs also leave ``data:`` out. Knows nothing of payloads.
"""

import re

HEAD_LENGTH = 4096
"""Of a data URI, before its payload: names of files are long where they are percent-encoded."""

# A blank, also as JSON and, read byte by byte, UTF-8 may have it.
_BLANK = (
    r"(?:[\s\u00a0\ufeff\u200b]|\\[nrtf]|\xc2\xa0|\xef\xbb\xbf"
    r"|\\u(?:0020|000[9aAdD]|00[aA]0|[fF][eE][fF][fF]|200[bB]))*"
)
_START = re.compile(
    rf"{_BLANK}(?:data{_BLANK}:|image\\?/[\w.+-]+{_BLANK};|;?base64,)", re.IGNORECASE
)
_SCHEME = re.compile(rf"{_BLANK}data{_BLANK}:", re.IGNORECASE)
_SCHEME_WITHIN = re.compile(r"data:", re.IGNORECASE)
_MARKER = re.compile(rf"(?:;|^|:){_BLANK}base64{_BLANK}(?:;[^,]*)?,", re.IGNORECASE)


def is_data_uri(text: str) -> bool:
    """Whether ``text`` begins as one does."""
    return _SCHEME.match(text[:HEAD_LENGTH]) is not None


def payload_start(text: str) -> int | None:
    """Where the base64 in ``text`` begins; None where it is no data URI in base64.

    A data URI that stands within another is the other's payload, and no base64. ``text`` may be as
    it was sent or as it stands in a JSON document.
    """
    head = text[:HEAD_LENGTH]
    start = _START.match(head)
    if start is None:
        return None
    marker = _MARKER.search(head, max(0, start.end() - len(";base64,")))
    if marker is None or _SCHEME_WITHIN.search(head, start.end(), marker.start()):
        return None
    return marker.end()
