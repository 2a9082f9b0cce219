"""Packages with another licence are refused; the joined icons are what was rendered."""

import json

import numpy as np
import pytest
from PIL import Image

from training import fetch
from training.dataset import build_icons, load_icons, load_large
from training.fetch import LICENCES, FetchError, install_packages


def _fake_npm(changed):
    def run(command, folder):
        assert command[:2] == ["npm", "install"]
        for name, licence in {**LICENCES, **changed}.items():
            package = folder / "node_modules" / name
            package.mkdir(parents=True)
            (package / "package.json").write_text(json.dumps({"license": licence}))

    return run


def test_expected_licences_are_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_run", _fake_npm({}))
    assert install_packages(tmp_path) == tmp_path / "node_modules"


def test_a_changed_licence_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_run", _fake_npm({"@iconify-json/noto": "GPL-3.0"}))
    with pytest.raises(FetchError, match=r"iconify-json/noto is licensed under .GPL"):
        install_packages(tmp_path)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(FetchError, match="no-such-program is not installed"):
        fetch._run(["no-such-program"], tmp_path)


def _render(folder, side):
    """What render.mjs writes for two concepts, one of which has a bitmap."""
    concepts = [
        {"key": "1f600", "name": "grinning-face", "styles": {"noto": 0, "flat": 1}},
        {"key": "1f34e", "name": "red-apple", "styles": {"noto": 2, "3d": "1f34e.webp"}},
    ]
    pictures = np.full((3, side, side, 4), (200, 100, 0, 128), np.uint8)
    pictures.tofile(folder / "svg.rgba")
    index = {"side": side, "pictures": 3, "concepts": concepts}
    (folder / "svg.json").write_text(json.dumps(index))


def test_icons_are_joined_and_premultiplied(tmp_path):
    _render(tmp_path, 8)
    Image.new("RGBA", (16, 16), (0, 0, 255, 255)).save(tmp_path / "1f34e.webp", lossless=True)
    build_icons(tmp_path, tmp_path, tmp_path)
    icons = load_icons(tmp_path, held_out=1)
    assert icons.styles == ("noto", "flat", "noto", "3d")
    assert icons.names == ("grinning face", "red apple")
    assert icons.pixels[0, 0, 0].tolist() == [100, 50, 0, 128]
    assert icons.pixels[3, 0, 0].tolist() == [0, 0, 255, 255]
    assert sorted([*icons.training_rows, *icons.held_out_rows]) == [0, 1, 2, 3]
    assert icons.rows_of(1) == [2, 3]


def test_large_drawings_are_split_by_concept(tmp_path):
    _render(tmp_path, 8)
    kept, held_out = load_large(tmp_path, held_out=1)
    assert len(kept) + len(held_out) == 3
    assert len(held_out) in (1, 2)
