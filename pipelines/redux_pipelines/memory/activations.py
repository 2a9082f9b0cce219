"""How many bytes a stage needs beside the weights, by size: what is alive at its highest point.

Derived from the code that runs, tensor by tensor, and held to what is measured on a CPU
(tests/pipelines/memory/test_activations.py). Workspaces inside an operator (of a convolution or a
matrix product) cannot be seen there and are not in here. Imports no torch. Knows no weights and no
GPU.
"""

from dataclasses import dataclass

from redux_pipelines.memory.model_sizes import EncoderSize, ModelSizes, TransformerSize

ROW_MULTIPLE = 16
"""To which the attention of a GPU fills up the rows, at most."""

STRIP_PIXELS = 128 * 1024
"""Of a strip, at most, where ``autoencoder`` decodes a picture in strips."""

_BORROWED = 1.05
"""A strip with the rows that it borrows from its neighbours."""

_FLOAT32 = 4
_FP8_COPIES = 3
"""float32 copies of a layer's input that ``reference.quantize_rows`` holds at once."""


GRAPH_BYTES = 32 * 2**20
"""Of a CUDA graph in the driver's memory: some thousand nodes. A guess: it was not measured."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request may ask for, at most: pixels, images at once, text and Redux rows.

    ``text_rows`` is 1 where equal tokens are folded and T5's length for a prompt.
    """

    width: int
    height: int
    batch: int = 1
    text_rows: int = 512
    redux_rows: int = 729

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of the network: of the text stream, of the image, and images in the batch."""

    text: int
    image: int
    batch: int = 1

    @property
    def total(self) -> int:
        """Of both streams."""
        return self.text + self.image


def rows_of(demand: Demand, size_multiple: int) -> RowCounts:
    """Rows for ``demand``, filled up as for a GPU's attention."""
    image = -(-demand.width // size_multiple) * -(-demand.height // size_multiple)
    text = demand.text_rows + demand.redux_rows
    return RowCounts(text + -(text + image) % ROW_MULTIPLE, image, demand.batch)


def denoise_bytes(
    size: TransformerSize, rows: RowCounts, element_bytes: int, *, is_fp8: bool = False
) -> int:
    """Peak of a forward pass, its input and output included.

    Of blocks of either kind, where rotated queries and keys are written; the last one's includes
    what it needs for text. In fp8, where the last product's input is quantised.
    """
    peaks = [
        _double(size, rows, element_bytes) if size.depth else 0,
        _single(size, rows, element_bytes) if size.depth_single > 1 else 0,
        _last(size, rows, element_bytes) if size.depth_single else 0,
        _quantized(size, rows, element_bytes) if is_fp8 and size.depth_single else 0,
    ]
    ends = rows.batch * rows.image * (size.in_channels + size.out_channels) * element_bytes
    return max(peaks) + ends


def graph_pool_bytes(
    size: TransformerSize, rows: int, element_bytes: int, *, is_fp8: bool = False
) -> int:
    """What CUDA graphs of up to ``rows`` rows, of all images together, share and keep.

    A forward pass's peak, however the rows are divided between text and image.
    """
    return denoise_bytes(size, RowCounts(0, rows), element_bytes, is_fp8=is_fp8)


def graph_bytes(size: TransformerSize, rows: int, batch: int, element_bytes: int) -> int:
    """What each of them has of its own: a step's inputs, its output, and the graph itself."""
    modulation = batch * size.modulation_rows * size.hidden * element_bytes
    row = (size.in_channels + size.out_channels + size.hidden) * element_bytes
    return modulation + rows * (row + 2 * _FLOAT32 * size.head_dim) + GRAPH_BYTES


def _double(size: TransformerSize, rows: RowCounts, element_bytes: int) -> int:
    """``x`` and heads, and one stream's projections with their rotation; or attention's output.

    The latter twice: by heads, and by rows.
    """
    width, largest = size.hidden * element_bytes * rows.batch, max(rows.text, rows.image)
    rotation = _rotation(size, largest, rows.batch, element_bytes)
    return (1 + 3) * width * rows.total + max(
        3 * width * largest + rotation, 2 * width * rows.total
    )


def _single(size: TransformerSize, rows: RowCounts, element_bytes: int) -> int:
    """``x``, queries and keys, and the one projection of seven widths; a rotation, or as below.

    Values, and attention's output twice: by heads, and by rows.
    """
    width = size.hidden * element_bytes * rows.batch
    rotation = _rotation(size, rows.total, rows.batch, element_bytes)
    return (1 + 2 + 7) * width * rows.total + max(rotation, 3 * width * rows.total)


def _last(size: TransformerSize, rows: RowCounts, element_bytes: int) -> int:
    """``x``, its norm, queries and keys; seven widths of image rows, two of text's; as above."""
    width = size.hidden * element_bytes * rows.batch
    kept = width * ((1 + 1 + 2) * rows.total + 7 * rows.image + 2 * rows.text)
    rotation = _rotation(size, max(rows.text, rows.image), rows.batch, element_bytes)
    return kept + max(rotation, width * (rows.total + 2 * rows.image))


def _rotation(size: TransformerSize, rows: int, batch: int, element_bytes: int) -> int:
    """``layers.norm_rope``: float32 queries and keys and their rotation, and what turns them.

    Float32 itself needs neither of the first.
    """
    copies = 2 if element_bytes < _FLOAT32 else 0
    kind = max(element_bytes, _FLOAT32)
    return rows * kind * 2 * (copies * batch * size.hidden + size.head_dim)


def _quantized(size: TransformerSize, rows: RowCounts, element_bytes: int) -> int:
    """A single block's ``x``, what it adds, attention, its projection; five widths in float32.

    That is plain torch. On the kernels five widths of one byte are held in their place, by
    ``fp8.workspace`` for the whole run, and no more than this is needed.
    """
    kept = (1 + 1 + 1 + 7) * element_bytes + _FP8_COPIES * 5 * _FLOAT32
    return kept * size.hidden * rows.batch * rows.total


def modulation_bytes(size: TransformerSize, steps: int, element_bytes: int) -> int:
    """Making a table: its rows twice (they are joined at the end), and one layer's weights."""
    table = steps * size.modulation_rows * size.hidden
    return (2 * table + size.modulation_layer) * element_bytes


def text_bytes(t5: EncoderSize, element_bytes: int) -> int:
    """T5: its position biases and as much again beside the gated MLP, or how these biases are made.

    They are one number per head and pair of tokens; that of a pair is looked up with integers. They
    are there twice because transformers 5.23 copies them for attention (``sdpa_attention``, which
    gives it contiguous ones); 5.17 does not, and needs less.
    """
    biases = t5.heads * t5.tokens**2 * element_bytes
    mlp = t5.tokens * (4 * t5.inner + 2 * t5.width) * element_bytes
    return max(2 * biases + mlp, biases + 46 * t5.tokens**2)


def vision_bytes(siglip: EncoderSize, redux_width: int, element_bytes: int) -> int:
    """SigLIP's MLP, or the Redux embedder's, which is three times as wide as its tokens."""
    widest = max(2 * siglip.inner + 4 * siglip.width, 2 * 3 * redux_width)
    return siglip.tokens * widest * element_bytes


def decode_bytes(sizes: ModelSizes, pixels: int, element_bytes: int) -> int:
    """One picture decoded whole: a level's input, its norm and what becomes of it; or four outputs.

    The latter in a level's later layers, where the residual is an output too.
    """
    levels = _levels(sizes, pixels)
    return max(max(2 * width + out, 4 * out) * at for width, out, at in levels) * element_bytes


def strip_decode_bytes(sizes: ModelSizes, pixels: int, element_bytes: int) -> int:
    """One picture decoded in strips: a level's input, what it becomes, and what a strip needs.

    Or whole, where that takes less.
    """
    levels = _levels(sizes, pixels)
    kept = max((max(width, out) + out) * at for width, out, at in levels)
    width, out, _ = levels[-1]
    strip = int(_BORROWED * max(2 * width, 3 * out) * min(STRIP_PIXELS, pixels))
    return min((kept + strip) * element_bytes, decode_bytes(sizes, pixels, element_bytes))


def _levels(sizes: ModelSizes, pixels: int) -> list[tuple[int, int, int]]:
    """Channels in, channels out and pixels of each level of the decoder, the smallest first."""
    outs = sizes.vae_channels[::-1]
    widths = (outs[0], *outs[:-1])
    return [
        (width, out, pixels // 4 ** (len(outs) - 1 - i))
        for i, (width, out) in enumerate(zip(widths, outs, strict=True))
    ]
