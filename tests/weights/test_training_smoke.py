"""The whole way in toy sizes: data, autoencoder, growth, joint training, export, generation."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from redux_pipelines.contract.types import GenerationRequest, Result
from redux_pipelines.loading.load import load_pipeline
from redux_weights.embedded import Checkpoint
from redux_weights.layout import find_missing
from training import export, synthetic, train_autoencoder, train_model
from training.cli import make_clock
from training.dataset import load_icons
from training.evaluate import Extent, evaluate
from training.settings import SMOKE
from training.workplace import Workplace

AUTOENCODER_STEPS, MODEL_STEPS = 120, 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished smoke run."""
    made = Workplace(tmp_path_factory.mktemp("mini"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        synthetic.write_icons(made.data)
        synthetic.write_photos(made.photos)
        train_autoencoder.train(made, SMOKE, make_clock(0, AUTOENCODER_STEPS))
        train_model.train(made, SMOKE, make_clock(0, MODEL_STEPS))
        export.export(made, SMOKE)
        yield made
    finally:
        torch.set_num_threads(threads)


def _journal(path, event):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def _generate(pipeline, **options):
    request = GenerationRequest(Image.new("RGB", (80, 60), "red"), num_inference_steps=3, **options)
    (result,) = [event for event in pipeline.generate(request) if isinstance(event, Result)]
    return result.images[0]


def test_losses_fall(place):
    steps = _journal(place.autoencoder / "autoencoder.jsonl", "step")
    assert steps[-1]["l1"] < steps[0]["l1"]
    (measured,) = _journal(place.autoencoder / "autoencoder.jsonl", "look")[-1:]
    assert measured["psnr_large"] > 11
    flows = [line["flow"] for line in _journal(place.model / "model.jsonl", "step")]
    assert min(flows[-2:]) < 0.85 * flows[0]


def test_the_export_is_complete_and_loads(place):
    assert find_missing(place.base, place.redux) == []
    pipeline = load_pipeline(base=place.base, redux=place.redux, device="cpu", dtype="float32")
    assert pipeline.info.size_multiple == 64
    assert _generate(pipeline, width=512, height=576).size == (512, 576)
    worded = _generate(pipeline, width=512, height=512, prompt="red disc, 3d")
    assert worded.size == (512, 512)


def test_exported_weights_are_the_averaged_ones_in_bfloat16(place):
    from diffusers import FluxTransformer2DModel

    saved = torch.load(place.model / "model.pt", weights_only=True)["average"]["weights"]
    loaded = FluxTransformer2DModel.from_pretrained(place.base / "transformer").state_dict()
    for name, value in loaded.items():
        expected = saved[f"transformer.{name}"].bfloat16()
        torch.testing.assert_close(value, expected, atol=0, rtol=0, check_dtype=False)


def test_a_finished_run_is_not_trained_further(place):
    training = train_model.train(place, SMOKE, make_clock(0, MODEL_STEPS))
    assert training.step == MODEL_STEPS


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(place, tmp_path):
    inputs, _ = train_model.prepare(place, SMOKE)

    def run(folder, clock_steps, stop_after):
        training = train_model.JointTraining(SMOKE, inputs, folder, make_clock(0, clock_steps))
        for _ in range(stop_after):
            training.train_step()
            training.clock.tick()
        training.save()
        return training

    straight = run(tmp_path / "straight", 100, 6)
    run(tmp_path / "resumed", 100, 3)
    resumed = run(tmp_path / "resumed", 100, 3)
    assert resumed.step == straight.step == 6
    for name, value in straight.model.state_dict().items():
        other = resumed.model.state_dict()[name]
        torch.testing.assert_close(other, value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_a_run_may_begin_with_a_finished_model(place, tmp_path):
    inputs, _ = train_model.prepare(place, SMOKE)
    finished = Checkpoint(place.base, place.redux)
    clock = make_clock(0, 10)
    training = train_model.JointTraining(SMOKE, inputs, tmp_path, clock, finished=finished)
    assert clock.fraction == SMOKE.joint.finished_at
    saved = torch.load(place.model / "model.pt", weights_only=True)["average"]["weights"]
    for name, value in training.averaged().state_dict().items():
        torch.testing.assert_close(value, saved[name].bfloat16().float(), atol=0, rtol=0)
    assert not [name for name in training.train_step() if name.startswith("alignment")]
    training.save()
    again = train_model.JointTraining(SMOKE, inputs, tmp_path, make_clock(0, 10), finished=finished)
    assert again.step == 1  # the checkpoint counts for more


def test_guidance_is_trained_at_the_end(place, tmp_path):
    sizes = replace(SMOKE, joint=replace(SMOKE.joint, guides_from=0.0, text_only=0.0))
    inputs, _ = train_model.prepare(place, sizes)
    training = train_model.JointTraining(sizes, inputs, tmp_path, make_clock(0, 10))
    assert training.train_step()["flow"] > 0  # the smallest grid, with a picture


@pytest.mark.slow
def test_the_evaluation_measures_the_export(place):
    icons = load_icons(place.data, SMOKE.held_out)
    report = evaluate(
        Checkpoint(place.base, place.redux),
        icons,
        place.photos,
        place.report,
        variants=["steps=2", "dtype=bfloat16", "quality=fast"],
        extent=Extent(icons=4, shown=2, few=2, words=1, drifting=2, steps=2),
    )
    assert report["retrieval"]["512x512"]["images"] == 4
    assert report["retrieval"]["1536x512"]["images"] == 2
    assert all(0 <= each["pixel_top1"] <= 1 for each in report["retrieval"].values())
    assert report["drift"]["steps=2"]["psnr"] > 90
    assert report["drift"]["quality=fast"]["psnr"] > 90  # two steps are all computed
    assert report["drift"]["dtype=bfloat16"]["psnr"] > 15
    assert report["safety"]["images"] > 40
    written = {path.name for path in place.report.iterdir()}
    assert {"report.json", "held-out-768x1344.jpg", "photographs.jpg", "words.jpg"} <= written
