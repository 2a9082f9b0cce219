"""How large the parts of a FLUX.1 + Redux checkpoint are, in parameters and in widths.

From the configurations and the headers of safetensors files; no tensor is read. Imports no torch.
Knows no GPU, no dtype and no plan.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MLP_RATIO = 4
_TIME_CHANNELS = 256
_FP8_NAMES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Parameters of a block: elements of its matrices, rows of these, and all that is no matrix."""

    matrices: int
    rows: int
    vectors: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.matrices + self.vectors

    def size_bytes(self, element_bytes: int, *, is_fp8: bool) -> int:
        """In fp8 a matrix has one byte an element and a float32 scale a row."""
        if is_fp8:
            return self.matrices + 4 * self.rows + element_bytes * self.vectors
        return element_bytes * self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSize:
    """Widths and depths of a FLUX transformer; the defaults are FLUX.1-dev's."""

    hidden: int = 3072
    head_dim: int = 128
    depth: int = 19
    depth_single: int = 38
    in_channels: int = 64
    out_channels: int = 64
    text_width: int = 4096
    pooled_width: int = 768
    has_guidance: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TransformerSize":
        """Sizes stated by diffusers' ``transformer/config.json``."""
        head_dim = config["attention_head_dim"]
        return cls(
            hidden=config["num_attention_heads"] * head_dim,
            head_dim=head_dim,
            depth=config["num_layers"],
            depth_single=config["num_single_layers"],
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            has_guidance=bool(config.get("guidance_embeds")),
        )

    @property
    def blocks(self) -> tuple[BlockSize, ...]:
        """Double blocks, then single ones, without their modulation."""
        square, qk_norm = self.hidden**2, 2 * self.head_dim
        rows = (3 + 1 + _MLP_RATIO + 1) * self.hidden  # qkv, proj, mlp_in, mlp_out
        double = BlockSize(2 * 12 * square, 2 * rows, 2 * (rows + qk_norm))
        rows = (3 + _MLP_RATIO + 1) * self.hidden  # linear1, linear2
        single = BlockSize(12 * square, rows, rows + qk_norm)
        return self.depth * (double,) + self.depth_single * (single,)

    @property
    def modulation_rows(self) -> int:
        """Rows of width ``hidden`` in a step of the modulation table."""
        return 12 * self.depth + 3 * self.depth_single + 2

    @property
    def modulation(self) -> int:
        """Parameters of the modulation layers."""
        return self.modulation_rows * self.hidden * (self.hidden + 1)

    @property
    def modulation_layer(self) -> int:
        """Parameters of the largest of them."""
        rows = 6 if self.depth else 3
        return rows * self.hidden * (self.hidden + 1)

    @property
    def embedders(self) -> int:
        """Parameters of all that is neither block nor modulation layer."""
        hidden = self.hidden
        linears = [(self.in_channels, hidden), (self.text_width, hidden)]
        linears += [(hidden, self.out_channels)]
        for width in (_TIME_CHANNELS, self.pooled_width, *self.has_guidance * (_TIME_CHANNELS,)):
            linears += [(width, hidden), (hidden, hidden)]
        return sum((inputs + 1) * outputs for inputs, outputs in linears)

    @property
    def parameters(self) -> int:
        """All of them."""
        blocks = sum(block.parameters for block in self.blocks)
        return blocks + self.modulation + self.embedders


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSize:
    """An encoder made of layers: parameters in all and of its largest layer, and its widths."""

    parameters: int
    layer: int = 0
    layers: int = 0
    width: int = 0
    inner: int = 0
    heads: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A whole checkpoint; the defaults are FLUX.1-dev's and FLUX.1-Redux-dev's.

    ``t5`` and ``clip`` are None where the checkpoint has no text encoders. ``vae_channels`` are
    ``block_out_channels``. ``is_fp8``: the transformer's matrices are stored in fp8.
    """

    transformer: TransformerSize = TransformerSize()
    t5: EncoderSize | None = EncoderSize(
        parameters=4_762_310_656,
        layer=192_948_224,
        layers=24,
        width=4096,
        inner=10_240,
        heads=64,
        tokens=512,
    )
    clip: EncoderSize | None = EncoderSize(parameters=123_060_480, tokens=77)
    siglip: EncoderSize = EncoderSize(
        parameters=428_225_600, width=1152, inner=4304, heads=16, tokens=729
    )
    redux: int = 64_503_808
    vae: int = 83_819_683
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    is_fp8: bool = False

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel along each side."""
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Pixels per image token along each side."""
        return 2 * self.vae_factor

    @property
    def parameters(self) -> int:
        """Of everything."""
        text = sum(each.parameters for each in (self.t5, self.clip) if each is not None)
        vision = self.siglip.parameters + self.redux + self.vae
        return self.transformer.parameters + text + vision


FLUX_DEV = ModelSizes()
FLUX_SCHNELL = ModelSizes(transformer=TransformerSize(has_guidance=False))


def read_sizes(base: Path, redux: Path) -> ModelSizes:
    """Sizes of a checkpoint in diffusers' layout.

    Its files must be complete (``redux_weights.layout`` checks that): otherwise ``OSError``,
    ``ValueError`` or ``KeyError``.
    """
    config = _config(base / "transformer")
    shards = _tensors(base / "transformer")
    return ModelSizes(
        transformer=TransformerSize.of(config),
        t5=_t5(base / "text_encoder_2", 512 if config.get("guidance_embeds") else 256),
        clip=_clip(base / "text_encoder"),
        siglip=_siglip(redux / "image_encoder"),
        redux=_count(redux / "image_embedder"),
        vae=_count(base / "vae"),
        vae_channels=tuple(_config(base / "vae")["block_out_channels"]),
        is_fp8=any(dtype in _FP8_NAMES for _, dtype, _ in shards),
    )


def _t5(folder: Path, tokens: int) -> EncoderSize | None:
    if not folder.is_dir():
        return None
    config = _config(folder)
    layers: dict[str, int] = {}
    for name, _, count in _tensors(folder):
        if found := re.match(r"encoder\.block\.(\d+)\.", name):
            layers[found[1]] = layers.get(found[1], 0) + count
    return EncoderSize(
        parameters=_count(folder),
        layer=max(layers.values(), default=0),
        layers=len(layers),
        width=config["d_model"],
        inner=config["d_ff"],
        heads=config["num_heads"],
        tokens=tokens,
    )


def _clip(folder: Path) -> EncoderSize | None:
    return EncoderSize(parameters=_count(folder), tokens=77) if folder.is_dir() else None


def _siglip(folder: Path) -> EncoderSize:
    config = _config(folder)
    config = config.get("vision_config", config)
    return EncoderSize(
        parameters=_count(folder),
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=config["num_attention_heads"],
        tokens=(config["image_size"] // config["patch_size"]) ** 2,
    )


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _count(folder: Path) -> int:
    return sum(count for _, _, count in _tensors(folder))


def _tensors(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, dtype (in safetensors' words) and number of elements of each tensor."""
    for path in sorted(_files(folder)):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry["dtype"], _product(entry["shape"])


def _files(folder: Path) -> set[Path]:
    """The weights: one file, or the shards that an index lists."""
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return {folder / shard for shard in shards}
        if (folder / name).is_file():
            return {folder / name}
    raise FileNotFoundError(f"{folder} holds no safetensors weights")


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
