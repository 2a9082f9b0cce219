"""Where a training run keeps its files. Knows paths only."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path.home() / ".cache" / "flux-redux-server" / "mini"


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folders below ``root``; they are made by whoever writes to them."""

    root: Path = DEFAULT_ROOT

    @property
    def packages(self) -> Path:
        """Downloads of npm and pip."""
        return self.root / "packages"

    @property
    def data(self) -> Path:
        """Icons and photographs, ready to train on."""
        return self.root / "data"

    @property
    def photos(self) -> Path:
        """scikit-image's photographs."""
        return self.data / "photos"

    @property
    def autoencoder(self) -> Path:
        """Checkpoint and log of the autoencoder."""
        return self.root / "autoencoder"

    @property
    def core(self) -> Path:
        """The finished f8 core, in diffusers' layout."""
        return self.autoencoder / "core"

    @property
    def vae(self) -> Path:
        """The finished f32 autoencoder, in diffusers' layout."""
        return self.autoencoder / "vae"

    @property
    def model(self) -> Path:
        """Checkpoint, tokenizers, log and sample sheets of the joint model."""
        return self.root / "model"

    @property
    def base(self) -> Path:
        """The exported counterpart of FLUX.1-dev."""
        return self.root / "export" / "base"

    @property
    def redux(self) -> Path:
        """The exported counterpart of FLUX.1-Redux-dev."""
        return self.root / "export" / "redux"

    @property
    def report(self) -> Path:
        """The evaluation's numbers and contact sheets."""
        return self.root / "report"
