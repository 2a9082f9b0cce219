"""`flux-redux weights quantize`, without its command line: what is written, and what is refused."""

import errno
import gc
import json
import os
import shutil
import weakref
from collections import namedtuple

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fp8_products import needs_fp8
from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.linear import E4M3
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading import fp8_export
from redux_pipelines.loading.flux_weights import WEIGHTS, Shards, fp8_layers
from redux_pipelines.loading.fp8_export import quantize_checkpoint
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.network.flux import FluxParams
from redux_weights.layout import find_missing

SHARD_BYTES = 20_000


def quantize(base, out, **options):
    return quantize_checkpoint(base, out, report=lambda *_: None, **options)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp8") / "one"
    return out, quantize(tiny.base, out)


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp8") / "many"
    quantize(tiny.base, out, shard_bytes=SHARD_BYTES)
    return out


def expected_tensors(tiny):
    config = json.loads((tiny.base / "transformer" / "config.json").read_text())
    layers = fp8_layers(FluxParams.of(config))
    view = Quantized(load_file(tiny.base / "transformer" / WEIGHTS), layers, torch.device("cpu"))
    return {key: view[key] for key in view}


def same(one, two):
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor.float(), two[key].float()), key


def test_the_file_holds_what_quantising_while_loading_gives(tiny, made):
    out, summary = made
    found = load_file(out / "transformer" / WEIGHTS)
    same(found, expected_tensors(tiny))
    assert {each.dtype for each in found.values()} >= {E4M3, torch.float32}
    assert summary.after_bytes == sum(each.nbytes for each in found.values())
    before = load_file(tiny.base / "transformer" / WEIGHTS)
    assert summary.before_bytes == sum(each.nbytes for each in before.values())
    kept = [key for key in before if found[key].dtype != E4M3]
    assert all(torch.equal(found[key], before[key]) for key in kept)


def test_shards_hold_the_same_and_none_is_larger_than_asked_for(tiny, sharded):
    folder = sharded / "transformer"
    shards = Shards(folder)
    same({key: shards[key] for key in shards}, expected_tensors(tiny))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        size = sum(each.nbytes for each in tensors.values())
        assert size <= SHARD_BYTES + 4 * 256 or len(tensors) <= 2
        scaled = {key.removesuffix("_scale") for key in tensors if key.endswith("_scale")}
        assert scaled <= tensors.keys(), "a scale is in the file of its weight"
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(shards[key].nbytes for key in shards)


def test_each_tensor_lies_at_a_multiple_of_its_elements_size(made):
    out, _ = made
    header = (out / "transformer" / WEIGHTS).read_bytes()
    size = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + size])
    about = entries.pop("__metadata__")
    assert size % 8 == 0
    assert about["format"] == "pt"
    assert json.loads(about["quantization_config"])["quant_method"] == "flux_redux_fp8"
    bytes_of = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    for name, entry in entries.items():
        assert entry["data_offsets"][0] % bytes_of[entry["dtype"]] == 0, name


def test_the_layout_is_whole_and_the_other_parts_are_those_of_the_base(tiny, made):
    out, summary = made
    assert find_missing(out, tiny.redux) == []
    names = {path.relative_to(tiny.base) for path in tiny.base.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == names
    others = [name for name in names if name.parts[0] != "transformer"]
    assert summary.linked + summary.copied == len(others)
    for name in others:
        assert (out / name).read_bytes() == (tiny.base / name).read_bytes()
        is_weights = name.suffix == ".safetensors"
        assert os.path.samefile(out / name, tiny.base / name) == is_weights, name


def test_the_config_says_what_was_done_and_left(tiny, made):
    config = json.loads((made[0] / "transformer" / "config.json").read_text())
    about = config.pop("quantization_config")
    assert config == json.loads((tiny.base / "transformer" / "config.json").read_text())
    assert (about["quant_method"], about["format"]) == ("flux_redux_fp8", 1)
    assert {"x_embedder", "proj_out", "norm_out.linear"} <= set(about["not_quantized"])
    assert not [name for name in about["not_quantized"] if "attn" in name or "ff" in name]


def test_a_disk_without_hard_links_gets_copies(tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    summary = quantize(tiny.base, tmp_path / "out")
    assert summary.linked == 0
    assert find_missing(tmp_path / "out", tiny.redux) == []


def test_a_hubs_links_become_the_files_behind_them(tiny, tmp_path):
    hub = shutil.copytree(tiny.base, tmp_path / "hub")
    blob = tmp_path / "blob"
    (hub / "vae" / WEIGHTS).rename(blob)
    (hub / "vae" / WEIGHTS).symlink_to("../../blob")
    quantize(hub, tmp_path / "out")
    assert not (tmp_path / "out" / "vae" / WEIGHTS).is_symlink()
    assert os.path.samefile(tmp_path / "out" / "vae" / WEIGHTS, blob)


def test_licences_go_along_and_single_file_checkpoints_do_not(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    (base / "LICENSE.md").write_text("non-commercial")
    (base / "flux1-dev.safetensors").write_bytes(b"24 GB")
    quantize(base, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "non-commercial"
    assert not (tmp_path / "out" / "flux1-dev.safetensors").exists()


@needs_fp8
def test_it_serves_as_a_base_and_equals_quantising_while_loading(
    tiny, made, load, request_for, finish, difference
):
    from pipelines.conftest import Checkpoint

    stored = load(Checkpoint(made[0], tiny.redux), transformer_dtype="fp8")
    loading = load(tiny, transformer_dtype="fp8")
    assert stored.info.dtype == loading.info.dtype == "float32 with fp8"
    one, two = (finish(each.generate(request_for())).images[0] for each in (stored, loading))
    assert difference(one, two) == 0


@pytest.mark.parametrize("wanted", ["auto", "same"])
def test_on_a_cpu_weights_are_widened_unless_fp8_is_asked_for(tiny, made, load, wanted, caplog):
    from pipelines.conftest import Checkpoint

    pipeline = load(Checkpoint(made[0], tiny.redux), transformer_dtype=wanted)
    assert pipeline.info.dtype == "float32"
    told = [record.message for record in caplog.records if "widened" in record.message]
    assert told == (
        ["the weights in fp8 are widened to float32 as they load: fp8 is slow on a CPU"]
        if wanted == "auto"
        else []
    )


def test_the_diffusers_backend_refuses_it(tiny, made):
    with pytest.raises(WeightsError, match="in fp8, which the diffusers backend cannot read: use"):
        load_pipeline(base=made[0], redux=tiny.redux, backend="diffusers", device="cpu")


def test_diffusers_itself_refuses_it(made):
    with pytest.raises(ValueError, match="Unknown quantization type, got flux_redux_fp8"):
        FluxTransformer2DModel.from_pretrained(made[0] / "transformer")


@pytest.mark.parametrize("place", ["folder", "file", "dangling"])
def test_what_is_there_is_not_touched(tiny, tmp_path, place):
    out = tmp_path / "out"
    if place == "folder":
        out.mkdir()
    elif place == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(WeightsError, match="out exists: choose another --out"):
        quantize(tiny.base, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_parent_is_said(tiny, tmp_path):
    with pytest.raises(WeightsError, match="a is not a folder: create it"):
        quantize(tiny.base, tmp_path / "a" / "out")


def test_a_full_disk_is_noticed_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match=r"has 0\.0 GB free, and 0\.0 GB are needed: make room"):
        quantize(tiny.base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["safetensors", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing(tiny, tmp_path, monkeypatch, place):
    def full(*_):
        if place == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("No space left on device (os error 28)")

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(fp8_export, "save_file", full)
    with pytest.raises(WeightsError, match=r"cannot write .*out: No space left on device"):
        quantize(tiny.base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tiny, tmp_path):
    seen = []

    def interrupt(done, total):
        seen.append([path.name for path in tmp_path.iterdir()])
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny.base, tmp_path / "out", report=interrupt)
    assert seen[-1] == [f".out.part-{os.getpid()}"]
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_up_to_the_end(tiny, tmp_path):
    told = []
    summary = quantize_checkpoint(
        tiny.base, tmp_path / "out", report=lambda *each: told.append(each)
    )
    done = [each[0] for each in told]
    assert done == sorted(done)
    assert told[-1] == (summary.after_bytes, summary.after_bytes)


def test_a_base_that_is_incomplete_is_refused(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    (base / "vae" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"incomplete:\n.*vae/config.json: is missing"):
        quantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_transformer_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    path = base / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"the transformer lacks proj_out\.bias"):
        quantize(base, tmp_path / "out")


def test_fp8_is_not_quantised_again(made, tmp_path):
    with pytest.raises(WeightsError, match="is in fp8 already: give the checkpoint it was made"):
        quantize(made[0], tmp_path / "out")


def test_weights_that_are_e4m3_already_are_refused(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    path = base / "transformer" / WEIGHTS
    tensors = load_file(path)
    key = "transformer_blocks.0.attn.to_q.weight"
    save_file({**tensors, key: tensors[key].to(E4M3)}, path)
    with pytest.raises(WeightsError, match=rf"{key} is F8_E4M3, and only F64, F32, F16, BF16"):
        quantize(base, tmp_path / "out")


def test_one_file_and_one_tensor_are_held_at_a_time(tiny, tmp_path, monkeypatch):
    files, tensors = [], []
    empty, read = fp8_export._empty, Quantized.__getitem__

    def spied_empty(planned):
        assert not [each for each in files if each() is not None], "the file before"
        made = empty(planned)
        files.extend(map(weakref.ref, made.values()))
        return made

    def spied_read(self, key):
        assert not [each for each in tensors if each() is not None], "the tensor before"
        tensor = read(self, key)
        if not key.endswith("_scale"):  # which comes with its weight
            tensors.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(fp8_export, "_empty", spied_empty)
    monkeypatch.setattr(Quantized, "__getitem__", spied_read)
    gc.disable()  # reference counts alone must do
    try:
        quantize(tiny.base, tmp_path / "out", shard_bytes=SHARD_BYTES)
    finally:
        gc.enable()
    assert len(files) > len(tensors) > 20


def test_every_new_file_is_on_the_disk_before_the_folder_appears(tiny, tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def spied(file):
        assert not (tmp_path / "out").exists()
        synced.append(os.fstat(file).st_ino)
        sync(file)

    monkeypatch.setattr(os, "fsync", spied)
    quantize(tiny.base, tmp_path / "out", shard_bytes=SHARD_BYTES)
    files = (tmp_path / "out" / "transformer").glob("*.safetensors")
    assert {path.stat().st_ino for path in files} == set(synced)


def test_who_may_read_the_config_may_read_the_weights(made):
    modes = {path.stat().st_mode for path in (made[0] / "transformer").iterdir()}
    assert len(modes) == 1
