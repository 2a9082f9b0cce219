"""Missing, empty and truncated files are each named; whole checkpoints pass."""

import json
import struct

import pytest

from redux_weights.layout import find_missing

DIFFUSERS = "diffusion_pytorch_model.safetensors"
JSON_FILES = {
    "base": [
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer_config.json",
    ],
    "redux": [
        "image_encoder/config.json",
        "image_embedder/config.json",
        "feature_extractor/preprocessor_config.json",
    ],
}
TENSOR_FILES = [
    f"base/transformer/{DIFFUSERS}",
    f"base/vae/{DIFFUSERS}",
    "base/text_encoder/model.safetensors",
    "base/text_encoder_2/model.safetensors",
    "redux/image_encoder/model.safetensors",
    f"redux/image_embedder/{DIFFUSERS}",
]


def _tensors(size=12):
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def root(tmp_path):
    for directory, names in JSON_FILES.items():
        for name in names:
            _write(tmp_path / directory / name, b"{}")
    for name in TENSOR_FILES:
        _write(tmp_path / name, _tensors())
    _write(tmp_path / "base/tokenizer/merges.txt", b"#version: 0.2\n")
    _write(tmp_path / "base/tokenizer_2/spiece.model", b"pieces")
    return tmp_path


def _problems(root):
    return [line.replace(f"{root}/", "") for line in find_missing(root / "base", root / "redux")]


def test_a_whole_checkpoint_has_no_problems(root):
    assert _problems(root) == []


def test_text_encoders_are_optional(root):
    for path in sorted((root / "base").glob("t[eo]*/*")):
        path.unlink()
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        (root / "base" / name).rmdir()
    assert _problems(root) == []


@pytest.mark.parametrize(
    "name", [f"{root}/{name}" for root, names in JSON_FILES.items() for name in names]
)
def test_a_missing_config_is_named(root, name):
    (root / name).unlink()
    (problem,) = _problems(root)
    assert problem.startswith(name.rsplit("/", 1)[0])


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_missing_weights_are_named(root, name):
    (root / name).unlink()
    assert _problems(root) == [f"{name}: is missing"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (_tensors()[:-1], "has 115 bytes instead of 116"),
        (_tensors() + b"x", "has 117 bytes instead of 116"),
        (_tensors()[:20], "is cut short: 20 bytes end inside its header"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer?"),
        (struct.pack("<Q", 4) + b"nope", "is not a safetensors file"),
    ],
    ids=["empty", "short", "long", "header", "pointer", "garbage"],
)
def test_damaged_weights_are_named(root, content, problem):
    name = f"base/vae/{DIFFUSERS}"
    (root / name).write_bytes(content)
    (line,) = _problems(root)
    assert line.startswith(f"{name}: ")
    assert problem in line


def test_every_shard_of_an_index_must_be_there(root):
    folder = root / "base/transformer"
    (folder / DIFFUSERS).unlink()
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}
    _write(folder / f"{DIFFUSERS}.index.json", json.dumps(index).encode())
    _write(folder / "one.safetensors", _tensors())
    assert _problems(root) == ["base/transformer/two.safetensors: is missing"]
    _write(folder / "two.safetensors", _tensors()[:-3])
    assert "two.safetensors: has 113 bytes instead of 116" in _problems(root)[0]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": []}'])
def test_a_broken_index_is_named(root, content):
    index = root / f"base/transformer/{DIFFUSERS}.index.json"
    _write(index, content)
    assert _problems(root) == [f"base/transformer/{DIFFUSERS}.index.json: is not a shard index"]


def test_a_missing_folder_is_one_line(root):
    for path in (root / "redux/image_encoder").iterdir():
        path.unlink()
    (root / "redux/image_encoder").rmdir()
    assert _problems(root) == ["redux/image_encoder: the folder is missing"]


def test_a_config_that_is_not_json_is_named(root):
    (root / "base/vae/config.json").write_text("<html>")
    assert _problems(root) == ["base/vae/config.json: is not JSON"]


def test_a_tokenizer_needs_one_of_its_file_sets(root):
    (root / "base/tokenizer/merges.txt").unlink()
    assert _problems(root) == ["base/tokenizer: needs tokenizer.json or vocab.json with merges.txt"]
    _write(root / "base/tokenizer/tokenizer.json", b"{}")
    assert _problems(root) == []
