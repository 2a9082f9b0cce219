"""What is measured is FLUX.1 and Redux by its sizes, and the same network on both sides."""

from dataclasses import replace

import pytest
import torch
from gpu_report import subject as subject_module
from gpu_report.random_weights import RandomTensors, filled, random_tensor
from gpu_report.runner import NotRun
from gpu_report.scale import FULL, SMALL
from gpu_report.subject import STEP, Subject, a_picture

from pipelines import full_size
from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.memory.model_sizes import FLUX_DEV

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def subject():
    return Subject(SMALL, CPU, torch.float32)


def test_the_full_size_is_that_of_flux_1_dev_and_its_redux():
    found = Subject(FULL, CPU, BF16).sizes
    assert found == replace(FLUX_DEV, t5=None, clip=None)
    assert dict(FULL.siglip) == {name: getattr(full_size.SIGLIP, name) for name in FULL.siglip}
    assert {name: FULL.vae[name] for name in full_size.VAE} == full_size.VAE
    config = full_size.on_meta("transformer").config
    assert {name: config[name] for name in FULL.transformer} == dict(FULL.transformer)


def test_weights_are_the_same_in_any_order_dtype_and_number_of_askings():
    halves, wholes = (RandomTensors(SMALL.transformer, CPU, each) for each in (BF16, torch.float32))
    names = list(halves)
    backwards = {name: halves[name] for name in reversed(names)}
    for name in names:
        assert torch.equal(halves[name], backwards[name])
        assert torch.equal(halves[name].float(), wholes[name])
    assert len({halves[name].flatten()[0].item() for name in names}) > len(names) // 2


def test_weights_are_scaled_by_what_goes_in_and_norms_are_near_one():
    matrix = random_tensor("x.weight", torch.Size((300, 400)), CPU).float()
    assert matrix.std().item() == pytest.approx(400**-0.5, rel=0.02)
    norm = random_tensor("norm_q.weight", torch.Size((500,)), CPU).float()
    assert norm.mean().item() == pytest.approx(1, abs=0.02)
    assert random_tensor("x.bias", torch.Size((500,)), CPU).abs().max() < 0.1


def test_a_buffer_that_nothing_fills_is_refused():
    class WithBuffer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("secret", torch.zeros(3, device="meta"))

    with pytest.raises(ValueError, match="secret"):
        filled(WithBuffer(), CPU, BF16)


def test_position_ids_are_those_of_a_model_that_is_made_as_usual(subject):
    siglip = subject.load().components.image_encoder._siglip
    (ids,) = (buffer for name, buffer in siglip.named_buffers() if name.endswith("position_ids"))
    assert ids.flatten().tolist() == list(range(64))


def test_pictures_differ_and_are_kept_apart():
    assert a_picture().tobytes() != a_picture(1).tobytes()
    assert a_picture().tobytes() == a_picture().tobytes()


@torch.inference_mode()
def test_numbers_stay_finite_through_as_many_blocks_as_flux_1_has():
    depth = {"num_layers": 19, "num_single_layers": 38}
    deep = replace(SMALL, transformer={**SMALL.transformer, **depth})
    subject = Subject(deep, CPU, BF16)
    loaded = subject.load()
    given = subject.conditioning(loaded.components)
    prepared, img = subject.step_of(loaded.engine, given, 128)
    velocity = prepared.predict(img, STEP).float()
    assert velocity.isfinite().all()
    assert 0.05 < velocity.std() < 20


def test_only_one_transformer_is_there_at_a_time(subject):
    plain = subject.load()
    assert subject.load() is plain
    assert not plain.engine.has_fp8
    assert subject.load(is_fp8=True).engine.has_fp8
    assert subject.load() is not plain


def test_a_card_on_which_no_plan_fits_is_no_failure(monkeypatch):
    def refuse(*_, **__):
        raise MemoryPlanError("a 4 GB card has 3.0 GB to use")

    monkeypatch.setattr(subject_module, "plan_here", refuse)
    with pytest.raises(NotRun, match="GB to use"):
        Subject(SMALL, CPU, torch.float32).load()


def test_a_pipeline_for_several_images_is_planned_for_the_card_as_it_was(subject):
    alone = subject.load().components.plan
    together = subject.pipeline(batch=4)
    assert together._components.plan.card == alone.card
    assert together._components.plan.options.demand.batch == 4
    assert together._components.denoiser is subject.load().engine
    request = GenerationRequest(
        a_picture(), width=512, height=512, num_inference_steps=1, num_images=2
    )
    *_, result = together.generate(request)
    assert len(result.images) == 2
