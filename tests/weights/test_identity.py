"""What tells checkpoints apart, and what does not."""

import shutil
from pathlib import Path

import pytest

from redux_weights import identity
from redux_weights.identity import weights_digest

FILES = {
    "base/model_index.json": b"{}",
    "base/transformer/config.json": b'{"num_layers": 2}',
    "base/transformer/diffusion_pytorch_model.safetensors": bytes(range(256)) * 8192,
    "redux/image_encoder/model.safetensors": b"small",
    "redux/image_embedder/config.json": b"{}",
}
LARGE = "base/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "one"


def digest(folder: Path) -> str:
    return weights_digest(folder / "base", folder / "redux")


def test_copies_have_one_digest_wherever_they_lie(folder: Path) -> None:
    copy = folder.with_name("another-name")
    shutil.copytree(folder, copy)
    (copy / "base/transformer/config.json").touch()
    (copy / "base/flux1-dev.safetensors").write_bytes(b"not a part of what is loaded")
    (copy / "base/README.md").write_text("nor is this")
    (copy / "base/model_index.json").write_text('{"_diffusers_version": "1"}')
    assert digest(copy) == digest(folder)
    assert len(digest(folder)) == 12


def test_links_as_the_hub_makes_them_are_followed(folder: Path) -> None:
    before, blob = digest(folder), folder.with_name("blob")
    (folder / LARGE).rename(blob)
    (folder / LARGE).symlink_to(blob)
    assert digest(folder) == before


@pytest.mark.parametrize("name", [name for name in FILES if "model_index" not in name])
def test_another_byte_is_another_checkpoint(folder: Path, name: str) -> None:
    before = digest(folder)
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest(folder) != before


def test_another_training_of_large_weights_is_seen_in_the_sample(folder: Path) -> None:
    before = digest(folder)
    path = folder / LARGE
    assert path.stat().st_size > identity._WHOLE_BYTES
    data = bytearray(path.read_bytes())
    data[8 + 4096 :: 1000] = bytes(len(data[8 + 4096 :: 1000]))  # one weight of a thousand
    path.write_bytes(data)
    assert digest(folder) != before


def test_a_missing_file_is_another_checkpoint(folder: Path) -> None:
    before = digest(folder)
    (folder / "redux/image_encoder/model.safetensors").unlink()
    assert digest(folder) != before
