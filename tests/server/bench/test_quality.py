"""What the images show: planted defects are named, and what is sound is not."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redux_pipelines.loading.vision import Vision, load_vision
from redux_server.bench.quality import Assessment, Quality, psnr, ssim
from redux_server.bench.target import Target
from redux_server.bench.task_client import COMPLETED, Sample
from redux_server.bench.workload import Workload, bundled_pictures, read_parameters
from server.bench.hosted import png, variation

COUNT = 12
WORKLOAD = Workload(bundled_pictures(), read_parameters(["size=512*512"]))
Render = Callable[[dict[str, Any]], bytes]


@pytest.fixture(scope="module")
def vision() -> Vision:
    return load_vision()


def body(index: int) -> dict[str, Any]:
    import json

    told: dict[str, Any] = json.loads(WORKLOAD.body(WORKLOAD.request(index)))
    return told


def assessed(
    folder: Path,
    encoder: Any,
    renders: dict[str, Render],
    count: int = COUNT,
    **options: Any,
) -> tuple[Quality, list[Sample]]:
    samples = []
    for name, render in renders.items():
        for index in range(count):
            sample = Sample(name, index, outcome=COMPLETED, flagged=[False])
            place = f"{name}-{index}.png"
            (folder / place).write_bytes(render(body(index)))
            sample.outputs.append(place)
            samples.append(sample)
    targets = [Target(name, "http://127.0.0.1:1", **options) for name in renders]
    quality = Assessment(WORKLOAD, targets, folder, encoder).assess(samples)
    return quality, samples


def anothers(told: dict[str, Any]) -> bytes:
    """In every second seed, the variation of the next input."""
    if told["seed"] % 2:
        return variation(told)
    pictures = WORKLOAD.pictures
    place = [each.sent for each in pictures].index(told["image"])
    return variation({**told, "image": pictures[(place + 1) % len(pictures)].sent})


def black(told: dict[str, Any]) -> bytes:
    return png(Image.new("RGB", (512, 512))) if told["seed"] == 1 else variation(told)


def wrong_size(told: dict[str, Any]) -> bytes:
    return variation({**told, "size": "512*520"}) if told["seed"] == 1 else variation(told)


def same_for_all_seeds(told: dict[str, Any]) -> bytes:
    return variation({**told, "seed": 7})


def one_for_all(told: dict[str, Any]) -> bytes:
    return variation({**told, "image": WORKLOAD.pictures[0].sent})


def undecodable(told: dict[str, Any]) -> bytes:
    return b"<html>busy</html>" if told["seed"] == 1 else variation(told)


@pytest.mark.parametrize("has_encoder", [False, True], ids=["pixels", "encoder"])
def test_a_sound_target_is_not_accused(tmp_path: Path, vision: Vision, has_encoder: bool) -> None:
    quality, samples = assessed(tmp_path, vision if has_encoder else None, {"good": variation})
    assert quality.findings == []
    assert {sample.outcome for sample in samples} == {COMPLETED}
    told = quality.targets["good"]
    assert told["images"] == COUNT
    assert told["diversity_over_seeds"]["mean"] > 0
    if has_encoder:
        assert told["likeness_to_input"]["mean"] > 0.5


@pytest.mark.parametrize(
    ("render", "words"),
    [
        (anothers, "another's picture: 6 of 12 images look like another input"),
        (one_for_all, "another's picture: one and the same image came for 6 different input"),
        (black, "6 of 12 images are black"),
        (same_for_all_seeds, "the same picture for all seeds: of 6 of 6 inputs"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
@pytest.mark.parametrize("has_encoder", [False, True], ids=["pixels", "encoder"])
def test_a_target_that_returns_what_it_should_not_is_named(
    tmp_path: Path, vision: Vision, render: Render, words: str, has_encoder: bool
) -> None:
    encoder = vision if has_encoder else None
    quality, _ = assessed(tmp_path, encoder, {"good": variation, "bad": render})
    assert any(text.startswith(f"bad: {words}") for text in quality.findings), quality.findings
    assert not any(text.startswith("good") for text in quality.findings)


@pytest.mark.parametrize(
    ("render", "kind", "detail"),
    [
        (wrong_size, "wrong_size", "512*520 instead of 512*512"),
        (undecodable, "undecodable", "cannot identify"),
    ],
    ids=["size", "bytes"],
)
def test_images_of_no_use_are_errors(
    tmp_path: Path, render: Render, kind: str, detail: str
) -> None:
    _, samples = assessed(tmp_path, None, {"bad": render})
    wrong = [sample for sample in samples if sample.outcome != COMPLETED]
    assert [sample.outcome for sample in wrong] == [kind] * 6
    assert all(detail in sample.detail for sample in wrong)


def test_a_black_image_that_the_checker_is_said_to_have_withheld_is_no_defect(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").write_bytes(png(Image.new("RGB", (512, 512))))
    sample = Sample("A", 0, outcome=COMPLETED, outputs=["a.png"], flagged=[True])
    target = Target("A", "http://127.0.0.1:1")
    quality = Assessment(WORKLOAD, [target], tmp_path, None).assess([sample])
    assert quality.findings == []
    assert quality.targets["A"]["safety_checker_fired"] == 1


def test_targets_that_claim_the_same_weights_are_compared_by_pixels(tmp_path: Path) -> None:
    def noisy(told: dict[str, Any]) -> bytes:
        import io

        image = np.asarray(Image.open(io.BytesIO(variation(told))), np.int16)
        noise = np.random.default_rng(told["seed"]).integers(-6, 7, image.shape)
        return png(Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)))

    renders: dict[str, Render] = {"A": variation, "B": noisy}
    between = assessed(tmp_path, None, renders, 2, weights="dev")[0].between["B/A"]
    # uniform noise of -6…6 has a variance of (13² - 1) / 12 = 14: 36.7 dB, less where it is clipped
    assert between["psnr_db"]["mean"] == pytest.approx(37.5, abs=1)
    assert 0 < between["ssim"]["mean"] < 1
    assert between["equal_pixels"] == 0
    equal = assessed(tmp_path, None, {"A": variation, "B": variation}, 2, weights="dev")[0].between
    assert equal["B/A"]["equal_pixels"] == 2
    assert equal["B/A"]["ssim"]["least"] == 1
    assert "ssim" not in assessed(tmp_path, None, renders, 2)[0].between["B/A"]


def test_ssim_is_that_of_the_paper() -> None:
    """Against the definition itself, window by window."""
    rng = np.random.default_rng(0)
    one = rng.uniform(0, 255, (16, 14, 3))
    two = (one + rng.normal(0, 30, one.shape)).clip(0, 255)
    grey = [each @ np.array([0.299, 0.587, 0.114]) for each in (one, two)]
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for top in range(6):
        for left in range(4):
            x, y = (each[top : top + 11, left : left + 11] for each in grey)
            mx, my = (x * window).sum(), (y * window).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 2.55**2, 7.65**2
            found.append(
                (2 * mx * my + c1) * (2 * cov + c2) / (mx**2 + my**2 + c1) / (vx + vy + c2)
            )
    assert ssim(one, two) == pytest.approx(np.mean(found), rel=1e-9)
    assert psnr(one, one) == 100
    assert psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), 255.0)) == 0


def test_bundled_pictures_are_the_same_every_time() -> None:
    random.seed()
    assert [each.digest for each in bundled_pictures()] == [
        each.digest for each in bundled_pictures()
    ]
    assert len({each.digest for each in bundled_pictures()}) == 6
