"""From names and directories to pipelines, and what is said when that fails."""

import logging
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from pipelines.pretended_gpus import PretendedGpus
from redux_pipelines.errors import AttentionError, WeightsError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load as load_module
from redux_pipelines.loading.load import load_pipeline, locate

try:
    import httpx2 as httpx  # which huggingface_hub uses since 2.0
except ModuleNotFoundError:
    import httpx


def test_fake_is_the_fake():
    assert isinstance(load_pipeline(model="fake"), FakePipeline)


def test_fake_slow_takes_time(request_for, finish):
    events = load_pipeline(model="fake-slow").generate(request_for())
    assert finish(events).timings["denoise_s"] >= 0.04


def test_tiny_needs_no_files_after_loading(request_for, finish):
    pipeline = load_pipeline(model="tiny", device="cpu")
    assert pipeline.info.name == "tiny"
    result = finish(pipeline.generate(request_for(prompt="a fox")))
    assert result.images[0].size == (512, 512)


def test_mini_is_embedded_and_under_no_other_models_licence(caplog):
    with caplog.at_level(logging.WARNING, "redux_pipelines"):
        info = load_pipeline(model="mini", device="cpu").info
    assert (info.name, info.size_multiple) == ("mini", 64)
    assert not [record.message for record in caplog.records]


def test_an_installation_without_the_embedded_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("redux_weights.embedded._PACKAGE", tmp_path / "redux_weights")
    with pytest.raises(WeightsError, match=r"no embedded mini model .*: install it again"):
        load_pipeline(model="mini")


def test_an_embedded_model_cut_short_is_said(monkeypatch, tmp_path):
    for part in ("base", "redux"):
        (tmp_path / "mini" / part).mkdir(parents=True)
    monkeypatch.setattr("redux_weights.embedded._PACKAGE", tmp_path)
    with pytest.raises(WeightsError, match=r"mini/base/transformer: the folder is missing"):
        load_pipeline(model="mini")


@pytest.mark.parametrize(
    ("model", "text"),
    [("mini", "trained on icons"), ("tiny", "never trained"), ("fake", "never trained")],
)
def test_models_whose_pictures_are_not_fluxs_have_a_caveat(model, text):
    assert text in load_module.caveat(model)


def test_flux_has_no_caveat():
    assert load_module.caveat("flux-dev") is None


def test_a_directory_goes_before_the_name_of_an_embedded_model(tiny):
    options = {"base": tiny.base, "redux": tiny.redux, "device": "cpu"}
    assert load_pipeline(model="mini", **options).info.name == "base"
    assert load_pipeline(model="flux-dev", **options).info.name == "flux-dev"


def test_a_directory_is_loaded_and_described(tiny, caplog):
    with caplog.at_level(logging.WARNING, "redux_pipelines"):
        pipeline = load_pipeline(base=tiny.base, redux=tiny.redux, device="cpu")
    info = pipeline.info
    assert (info.name, info.backend, info.device) == ("base", "engine", "cpu")
    assert (info.dtype, info.size_multiple) == ("float32", 64)
    assert sum("non-commercial" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_the_backend_that_was_asked_for_runs(backend, tiny, load):
    pipeline = load(tiny, backend=backend)
    assert pipeline.info.backend == backend
    assert ("Engine" in type(pipeline._components.denoiser).__name__) == (backend == "engine")


def test_bfloat16_runs_on_a_cpu(tiny, load, request_for, finish):
    pipeline = load(tiny, dtype="bfloat16")
    assert pipeline.info.dtype == "bfloat16"
    assert finish(pipeline.generate(request_for(prompt="a fox"))).images[0].size == (512, 512)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "model name or a base"),
        (
            {"model": "sdxl"},
            "'sdxl' is not one of mini, tiny, fake, fake-slow, flux-dev, flux-schnell",
        ),
        ({"model": "sdxl", "base": "/somewhere"}, "'sdxl' is not one of"),
        ({"model": "tiny", "backend": "onnx"}, "backend='onnx' is not one of"),
        ({"model": "tiny", "dtype": "int8"}, "dtype='int8' is not one of"),
        ({"model": "tiny", "device": "tpu"}, "device='tpu' is not one of"),
        ({"model": "flux-dev", "attention": "cuddn"}, "'cuddn' is not one of auto, flash4"),
        (
            {"model": "tiny", "attention": "biased", "backend": "diffusers"},
            "attention='biased' needs backend='engine'",
        ),
        ({"model": "fake", "quality": "best"}, "'best' is not one of 'exact', 'balanced', 'fast'"),
        (
            {"model": "mini", "quality": "fast", "backend": "diffusers"},
            "quality='fast' needs backend='engine': backend='diffusers' has only 'exact'",
        ),
    ],
    ids=str,
)
def test_unknown_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        load_pipeline(**options)


def test_the_attention_is_told_and_can_be_forced(tiny, load):
    pipeline = load(tiny)
    assert pipeline.info.attention == "onednn"
    assert pipeline._components.denoiser._operators.name == "onednn"
    assert load(tiny, attention="flash-cpu").info.attention == "flash-cpu"
    assert load(tiny, backend="diffusers").info.attention == "native"


def test_a_forced_attention_that_cannot_run_says_why_and_what_can(tiny, load):
    with pytest.raises(
        AttentionError, match=r"cudnn runs on cuda, not on cpu; .* onednn, biased, fl"
    ):
        load(tiny, attention="cudnn")


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        load_pipeline(model="tiny", device="cuda")


@pytest.mark.parametrize(
    ("named", "within"), [("auto", 0), ("cpu", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_model_is_loaded_with_its_device_current(tiny, monkeypatch, named, within):
    gpus = PretendedGpus(2).install(monkeypatch)
    seen = []

    def stop(*_):
        seen.append(gpus.current)
        raise WeightsError("far enough")

    monkeypatch.setattr("redux_pipelines.loading.components.load_components", stop)
    with pytest.raises(WeightsError, match="far enough"):
        load_pipeline(base=tiny.base, redux=tiny.redux, device=named)
    assert seen == [within]
    assert gpus.current == 0


def test_missing_files_are_all_named(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    (base / "vae" / "config.json").unlink()
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(WeightsError) as raised:
        load_pipeline(base=base, redux=tiny.redux, device="cpu")
    assert "vae/config.json: is missing" in str(raised.value)
    assert "model.safetensors: has" in str(raised.value)


def test_parts_of_different_families_are_refused(tiny, tmp_path):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    redux = shutil.copytree(tiny.redux, tmp_path / "redux")
    ReduxImageEncoder(redux_dim=32, txt_in_features=48).save_pretrained(redux / "image_embedder")
    with pytest.raises(WeightsError, match="Redux tokens are 48 wide, but 32 is expected"):
        load_pipeline(base=tiny.base, redux=redux, device="cpu")


def test_a_transformer_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"the transformer lacks proj_out\.bias"):
        load_pipeline(base=base, redux=tiny.redux, device="cpu")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./models", "flux", "a/b/c"])
def test_a_place_that_is_nothing_is_said(source):
    with pytest.raises(WeightsError, match=r"neither a directory nor a hub .*--base"):
        locate(source, (), option="--base")


def _response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.GatedRepoError("gated", response=_response(403)), "accept the licence.*HF_TOKEN"),
        (errors.RepositoryNotFoundError("401", response=_response(401)), "set HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=_response(404)), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline"), "hf download"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError("500", response=_response(500)), "HfHubHTTPError: 500"),
        (OSError("disk full"), "OSError: disk full"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_say_what_to_do(error, text, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=rf"cannot get o/n: .*{text}.*--redux DIR"):
        locate("o/n", (), option="--redux", revision="v9")


def test_flux_dev_fetches_no_single_file_checkpoint(monkeypatch, tiny):
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked[repository] = (revision, allow_patterns)
        return tiny.redux if "Redux" in repository else tiny.base

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipeline = load_pipeline(model="flux-dev", revision="abc", device="cpu")
    assert pipeline.info.name == "flux-dev"
    assert set(asked) == {load_module.FLUX_DEV, load_module.FLUX_REDUX}
    assert asked[load_module.FLUX_DEV][0] == "abc"
    assert asked[load_module.FLUX_REDUX][0] is None
    patterns = asked[load_module.FLUX_DEV][1]
    files = ["flux1-dev.safetensors", "ae.safetensors", "transformer/config.json", "dev_grid.jpg"]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))
    assert kept == ["transformer/config.json"]


def test_offline_mode_is_honoured(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from redux_pipelines.loading.load import load_pipeline\n"
        "load_pipeline(model='flux-schnell')"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "WeightsError: cannot get black-forest-labs/FLUX.1-schnell" in done.stderr
    assert "torch" not in done.stderr
