"""``generate`` and ``warmup`` in this process, with the fake model."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e2e.live import a_picture
from redux_pipelines.contract.types import CompilePlan
from redux_pipelines.errors import WeightsError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.images import safety
from redux_pipelines.loading import load as load_module
from redux_server import __version__
from redux_server.cli import serve
from redux_server.cli.main import EXIT_USAGE, run
from redux_server.settings import ServerSettings, UsageError
from server.compiling import DONE, FAILED, loads


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "olive").save(path)
    return path


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**_: Any) -> None:
        raise AssertionError("the model was loaded for a request that could be refused before")

    monkeypatch.setattr(load_module, "load_pipeline", load)


def generate(image: object, out: Path, *flags: str) -> int:
    size = () if "--size" in flags else ("--size", "512*640")
    return run(["generate", str(image), "-o", str(out), "--model", "fake", *size, *flags])


def test_one_image_has_the_given_name(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.png"
    assert generate(photo, out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert list(out.parent.iterdir()) == [out]
    with Image.open(out) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (512, 640))


def test_several_images_are_numbered(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(photo, tmp_path / "o.png", "--num-images", "3") == 0
    expected = [tmp_path / f"o-{i}.png" for i in range(3)]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in expected]
    assert len({path.read_bytes() for path in expected}) == 3
    assert not (tmp_path / "o.png").exists()


def test_the_file_says_how_it_was_made_but_not_the_prompt(photo: Path, tmp_path: Path) -> None:
    generate(photo, tmp_path / "o.png", "--seed", "5", "--prompt", "a secret place")
    with Image.open(tmp_path / "o.png") as image:
        text = image.info
    assert text["AI-Generated"] == "true"
    assert (text["Seed"], text["Steps"], text["Guidance"]) == ("5", "28", "3.5")
    assert text["Model"].startswith("fake")
    assert "secret" not in str(text)


def test_the_same_seed_makes_the_same_file(photo: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        generate(photo, tmp_path / name, "--seed", "0")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_seed_that_was_picked_is_reported(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(photo, tmp_path / "o.png", "--json")
    printed = capsys.readouterr()
    seed = json.loads(printed.out.splitlines()[-1])["seed"]
    assert 0 <= seed < 2**31
    assert f"seed {seed}\n" in printed.err


def test_json_is_the_last_line_and_complete(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(photo, tmp_path / "o.png", "--json", "--seed", "9", "--num-images", "2")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    timings = summary.pop("timings")
    assert summary == {
        "seed": 9,
        "seeds": [9, 10],
        "files": [str(tmp_path / "o-0.png"), str(tmp_path / "o-1.png")],
        "has_nsfw_contents": [False, False],
        "model": "fake",
        "quality": "exact",
        "reused_steps": 0,
    }
    assert set(timings) == {"load_s", "encode_s", "denoise_s", "decode_s", "safety_s"}
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in timings.values())


@pytest.mark.parametrize(
    ("flags", "environ", "tier"),
    [
        ((), {}, "exact"),
        (("--quality", "fast"), {}, "fast"),
        ((), {"FLUX_REDUX_QUALITY": "balanced"}, "balanced"),
        (("--quality", "exact"), {"FLUX_REDUX_QUALITY": "balanced"}, "exact"),
    ],
)
def test_the_tier_is_used_and_said(
    flags: tuple[str, ...],
    environ: dict[str, str],
    tier: str,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert generate(photo, tmp_path / "o.png", "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["quality"] == tier
    with Image.open(tmp_path / "o.png") as image:
        assert image.info["Quality"] == tier


class _FlagsSecond:
    def __init__(self, *, threshold: float) -> None:
        assert threshold == 0.8

    def check(self, images: tuple[Image.Image, ...]) -> tuple[bool, ...]:
        return tuple(i == 1 for i in range(len(images)))


def test_a_flagged_image_is_black_and_said(
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(safety, "OpenNsfwChecker", _FlagsSecond)
    assert generate(photo, tmp_path / "o.png", "--num-images", "2", "--json") == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'o-1.png'} is black" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["has_nsfw_contents"] == [False, True]
    with Image.open(tmp_path / "o-0.png") as kept, Image.open(tmp_path / "o-1.png") as withheld:
        assert kept.getextrema() != ((0, 0),) * 3
        assert withheld.getextrema() == ((0, 0),) * 3


def test_without_the_safety_checker_it_is_not_even_loaded(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(safety, "OpenNsfwChecker", load)
    assert generate(photo, tmp_path / "o.png", "--no-safety-checker") == 0


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--size", "100*100"], 'size must be "WIDTH*HEIGHT", each from 512 to 1536'),
        (["--seed", "-2"], "seed must be an integer from -1 (random) to 9999999999; got -2."),
        (["--num-inference-steps", "0"], "num_inference_steps must be an integer from 1 to 50"),
        (["--guidance-scale", "0.5"], "guidance_scale must be a number from 1 to 20; got 0.5."),
        (["--num-images", "5"], "num_images must be an integer from 1 to 4; got 5."),
        (["--prompt", "x" * 10_001], "prompt must be a text of at most 10000 characters"),
        (["-o", "out.gif"], "--out must be the name of a .png file (--output-format png), got"),
        (["-o", "folder.png"], "--out must be the name of a .png file"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_slow(
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert generate(photo, tmp_path / "o.png", *flags) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
def test_a_url_is_referred_to_submit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("https://example.com/a.png", tmp_path / "o.png") == 2
    assert "flux-redux submit" in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("name", "content"),
    [("absent.png", None), ("text.png", b"hello"), ("cut.png", b"\x89PNG\r\n\x1a\n"), ("", None)],
)
def test_a_picture_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert generate(tmp_path / name, tmp_path / "o.png") == 1
    error = capsys.readouterr().err
    assert error.startswith("flux-redux: ")
    assert str(tmp_path / name) in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(WeightsError("FLUX is not here"), 1), (ValueError("device='cuda', but there is none"), 2)],
)
def test_a_model_that_cannot_be_loaded_is_said_without_a_traceback(
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    def load(**_: Any) -> None:
        raise error

    monkeypatch.setattr(load_module, "load_pipeline", load)
    assert generate(photo, tmp_path / "o.png") == code
    assert f"flux-redux: {error}\n" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_the_model_settings_reach_the_pipeline(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(**options: Any) -> FakePipeline:
        asked.update(options)
        return FakePipeline()

    monkeypatch.setattr(load_module, "load_pipeline", load)
    monkeypatch.setenv("FLUX_REDUX_DTYPE", "float32")
    monkeypatch.setenv("FLUX_REDUX_MEMORY", "offload")
    generate(photo, tmp_path / "o.png", "--base", "/b", "--redux", "/r", "--backend", "diffusers")
    assert asked == {
        "model": "fake",
        "base": "/b",
        "redux": "/r",
        "revision": None,
        "backend": "diffusers",
        "device": "auto",
        "dtype": "float32",
        "transformer_dtype": "auto",
        "max_batch_size": 1,
        "memory": "offload",
        "attention": "auto",
        "quality": "exact",
        "cuda_graphs": 0,  # one picture would not gain what they take to make
        "parallel": 1,
    }


def test_generate_takes_all_of_it_and_out_decides_the_kind(tmp_path: Path) -> None:
    for name, data in (("a.png", a_picture(40, 40, "red")), ("b.png", a_picture(40, 40, "blue"))):
        (tmp_path / name).write_bytes(data)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    common = ["generate", a, "--model", "fake", "--size", "512*512", "--seed", "1"]
    flags = ["--images", b, "--image-weights", "1,0.5", "--redux-strength", "2", "--mask", b]
    flags += ["--redux-pooling", "9", "--fit", "letterbox", "--empty-prompt", "encode"]
    assert run([*common, *flags, "-o", str(tmp_path / "o.jpg")]) == 0
    assert run([*common, "-o", str(tmp_path / "plain.png")]) == 0
    with Image.open(tmp_path / "o.jpg") as steered, Image.open(tmp_path / "plain.png") as plain:
        assert steered.format == "JPEG"
        said = steered.getexif()[0x010E].splitlines()
        assert {"Picture-Weights: 2, 1", "Pooling: 9", "Fit: letterbox", "Mask: yes"} <= set(said)
        assert steered.getpixel((0, 0)) != plain.getpixel((0, 0))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["-o", "o.jpg", "--output-format", "webp"], "--out must be the name of a .webp file"),
        (["-o", "o.gif"], "--out must be the name of a .png file"),
        (["--redux-strength", "11"], "redux_strength must be a number from 0 to 10; got 11.0"),
        (["--image-weights", "1,2"], "image_weights must be an array"),
        (["--image-weights", "a"], "invalid numbers value: 'a'"),
        (["--fit", "crop"], 'fit must be one of "squash"'),
    ],
    ids=str,
)
def test_flags_of_no_use_are_refused_before_anything_is_loaded(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "a.png", *flags]) == 2
    assert text in capsys.readouterr().err


# --- warmup ---------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_warmup_says_what_it_did(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = loads(monkeypatch, DONE)
    assert run(["warmup", "--compile", "full", "--sizes", "512x640,1024*1024"]) == 0
    (plan,) = pipeline.plans
    assert plan == CompilePlan(
        mode="full",
        sizes=((512, 640), (1024, 1024)),
        cuda_graphs="auto",
        cache_dir=home / "cache" / "flux-redux" / "compile",
        version=__version__,
    )
    printed = capsys.readouterr().out
    for line in (
        "load the model: 0.0 s",
        "16x16 tokens, batch 1: 33.0 s",
        "compiled (full): 2 graphs, of which 1 were kept from before",
    ):
        assert line in printed.splitlines()


def test_warmup_that_fails_says_why_and_exits_with_1(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = loads(monkeypatch, FAILED)
    assert run(["warmup", "--compile", "blocks"]) == 1
    assert "not compiled: no compiler here" in capsys.readouterr().out
    assert pipeline.plans[0].sizes == ((512, 512),)  # of a CPU


def test_the_fake_model_has_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["warmup", "--model", "fake", "--compile", "full"]) == 1
    assert "the fake model has nothing to compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to warm up: give --compile full (or blocks), or --cuda-graphs N"),
        (["--compile", "full", "--sizes", "9x9"], "--warm-sizes must be sizes separated by commas"),
        (["--compile", "full", "--warm-sizes", ""], "--warm-sizes must be sizes such as 512x512,"),
        (["--compile", "full", "--warm-sizes", "big"], "--warm-sizes must be sizes such as"),
        (["--compile", "yes"], "--compile must be one of off, blocks, full, got 'yes'"),
        (["--compile", "full", "--backend", "diffusers"], "need --backend engine"),
        (["--cuda-graphs", "2", "--backend", "diffusers"], "need --backend engine"),
        (["--cuda-graphs", "65"], "--cuda-graphs must be for how many shapes"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused_at_once(
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load_module, "load_pipeline", lambda **_: pytest.fail("loaded"))
    assert run(["warmup", *arguments]) == EXIT_USAGE
    assert complaint in capsys.readouterr().err


def test_other_verbs_refuse_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "a.png")
    assert run(["generate", picture, "--compile", "full", "--backend", "diffusers"]) == EXIT_USAGE
    assert "--compile and --cuda-graphs need --backend engine" in capsys.readouterr().err
    with pytest.raises(UsageError, match="need --backend engine, got 'diffusers'"):
        serve.check(ServerSettings(data_dir=tmp_path, compile="full", backend="diffusers"))
