"""One checkpoint on several devices: which ones, what is refused, and that images are the same."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.errors import DeviceError, RequestError
from redux_pipelines.loading.load import check_parallel, load_pipeline
from redux_pipelines.loading.parallel import ranks_of


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    from pipelines.conftest import Checkpoint
    from redux_pipelines.loading.tiny import build_tiny

    return Checkpoint(*build_tiny(tmp_path_factory.mktemp("heads"), heads=4))


def pixels(result):
    return [np.asarray(each, dtype=int) for each in result.images]


def test_images_on_two_ranks_are_those_of_one_until_a_rank_is_lost(
    four_heads, load, request_for, finish, tmp_path, monkeypatch
):
    """One test for what needs a pipeline of two processes, which takes seconds to start."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = load(four_heads, max_batch_size=2)
    two = load(four_heads, max_batch_size=2, parallel=2)
    assert (one.info, two.info) == (replace(two.info, parallel=1), replace(one.info, parallel=2))
    plain = request_for(num_inference_steps=9)
    for asked in (
        plain,
        replace(plain, quality="fast", num_inference_steps=12),
        replace(plain, prompt="a fox", width=576, height=512, num_images=2, redux_strength=0.4),
    ):
        alone, shared = (finish(each.generate(asked)) for each in (one, two))
        assert alone.reused_steps == shared.reused_steps
        for ours, theirs in zip(pixels(shared), pixels(alone), strict=True):
            assert np.abs(ours - theirs).max() <= 1
            assert np.ptp(ours) > 100
    given_up = two.generate(plain)
    next(given_up), next(given_up)
    given_up.close()
    with pytest.raises(RequestError):
        two.generate(replace(plain, width=100))
    again = finish(two.generate(plain))
    assert np.abs(pixels(again)[0] - pixels(finish(one.generate(plain)))[0]).max() <= 1
    events = two.generate(plain)
    next(events)
    (folder,) = tmp_path.iterdir()
    (rank,) = two._components.denoiser._root.followers.pids
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 on cpu was killed by signal 9"):
        list(events)
    assert not folder.exists()
    with pytest.raises(DeviceError, match="rank 1 on cpu"):
        finish(two.generate(plain))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parallel": 3}, "parallel=3 is not one of 1, 2, 4"),
        ({"parallel": 2, "backend": "diffusers"}, "parallel=2 needs backend='engine'"),
        ({"parallel": 2, "memory": "evict"}, "parallel=2 needs all weights on each GPU"),
        ({"parallel": 4, "memory": "offload"}, "parallel=4 needs all weights on each GPU"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(options, reason):
    with pytest.raises(ValueError, match=reason):
        load_pipeline(model="tiny", **options)


@pytest.mark.parametrize("memory", ["auto", "resident"])
def test_what_goes_together_is_not_refused(memory):
    check_parallel(LoadOptions(parallel=4, memory=memory))
    check_parallel(LoadOptions(parallel=1, memory="offload", backend="diffusers"))


def test_heads_that_do_not_divide_are_said_at_the_load():
    with pytest.raises(ValueError, match=r"parallel=2 does not divide .* 3 attention heads"):
        load_pipeline(model="tiny", device="cpu", parallel=2)


@pytest.mark.parametrize(
    ("device", "parallel", "expected"),
    [
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ("cuda:2", 2, ["cuda:2", "cuda:3"]),
        ("cuda:3,cuda:1", 2, ["cuda:3", "cuda:1"]),
        ("cpu", 2, ["cpu", "cpu"]),
    ],
)
def test_devices_are_those_that_follow_or_those_named(monkeypatch, device, parallel, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert ranks_of(device, parallel) == tuple(map(torch.device, expected))


@pytest.mark.parametrize(
    ("device", "count", "reason"),
    [
        ("auto", 0, "parallel=2 needs 2 GPUs, and torch sees none"),
        ("cuda:0", 1, "needs cuda:0, cuda:1, and torch sees 1 GPUs"),
        ("cuda:3", 4, "needs cuda:3, cuda:4, and torch sees 4 GPUs"),
        ("cuda:0,cuda:0", 4, "one GPU, or 2 different ones, got 'cuda:0,cuda:0'"),
        ("cuda:0,cuda:1,cuda:2", 4, "one GPU, or 2 different ones"),
    ],
)
def test_too_few_devices_are_said(monkeypatch, device, count, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=reason):
        ranks_of(device, 2)
