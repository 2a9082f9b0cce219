"""How the rows of a batch are shared out among ranks.

Every rank gets neighbouring rows of the text and of the image, as many as the others or one more:
shares need not be equal, so nothing is filled up, and attention sees the very keys it would see in
one process. Knows no tensors.
"""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Shares:
    """``counts[r]`` neighbouring rows for each rank r, rank 0's first."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, ranks: int) -> "Shares":
        """``rows`` for ``ranks``; the first ones have one more where they do not divide."""
        least, more = divmod(rows, ranks)
        return cls(tuple(least + (rank < more) for rank in range(ranks)))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rows of each rank."""
        ends = accumulate(self.counts)
        return tuple(slice(end - n, end) for n, end in zip(self.counts, ends, strict=True))


@dataclass(frozen=True, slots=True)
class RowShares:
    """Those of text and image."""

    txt: Shares
    img: Shares

    @classmethod
    def of(cls, txt_rows: int, img_rows: int, ranks: int) -> "RowShares":
        """At least one row of each for every rank: ``ValueError`` if there are too few."""
        if min(txt_rows, img_rows) < ranks:
            raise ValueError(
                f"{txt_rows} rows of text and {img_rows} of image are too few for {ranks} ranks"
            )
        return cls(Shares.of(txt_rows, ranks), Shares.of(img_rows, ranks))

    def counts(self, rank: int) -> tuple[int, int]:
        """Rows of text and of image that ``rank`` has."""
        return self.txt.counts[rank], self.img.counts[rank]

    def of_img(self) -> "RowShares":
        """Those of the image alone."""
        return RowShares(Shares((0,) * len(self.txt.counts)), self.img)
