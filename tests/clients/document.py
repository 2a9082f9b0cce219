"""docs/internals/compatibility.md as a source of tests: the code under each of its headings."""

import re
from dataclasses import dataclass

from clients.environments import ROOT

PLACE = ROOT / "docs/internals/compatibility.md"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code and the language it says it is in."""

    language: str
    code: str

    def here(self, url: str, key: str, picture: str) -> str:
        """The code with this server, key and picture in place of the document's."""
        ours = {
            "http://127.0.0.1:8000": url,
            "frs_...": key,
            "https://example.com/photo.jpg": picture,
        }
        code = self.code
        for documented, own in ours.items():
            code = code.replace(documented, own)
        return code


def sections() -> dict[str, list[Block]]:
    """The blocks under each heading of the third level that has any."""
    found = {}
    for part in re.split(r"^##+ ", PLACE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if blocks := [Block(*match) for match in _FENCE.findall(text)]:
            found[heading] = blocks
    return found
