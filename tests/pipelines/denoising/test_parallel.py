"""A network on two and on four ranks computes what it does on one."""

import gc
import os
import signal
import time
import weakref
from dataclasses import replace
from math import inf, log
from types import SimpleNamespace

import pytest
import torch

from fp8_products import needs_fp8
from pipelines import networks, ranks
from redux_pipelines.denoising.parallel import Join, Told, follow
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.errors import DeviceError
from redux_pipelines.sampling import Schedule

GRID = networks.small_grid(5, 5)  # 25 rows: neither 2 nor 4 divides them


@pytest.fixture(scope="module")
def model():
    return networks.diffusers_model(num_attention_heads=4)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    ranks.save(model, folder)
    return folder


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def several(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks.save(model, folder)
    started = ranks.Ranks(folder, [ranks.CPU] * request.param)
    yield started
    started.followers.close()


def weighed(given, *weights):
    """Pictures that count with these weights, of which 0 is not at all."""
    redux = tuple(
        replace(each, log_weight=log(weight) if weight else -inf)
        for each, weight in zip(given.redux, weights, strict=True)
    )
    return replace(given, redux=redux)


def conditionings(model):
    """By what each one is for."""
    several = networks.conditioning(model, copies=512, redux=(6, 3, 4))
    return {
        "no equal tokens": networks.conditioning(model, text=7, redux=(6,)),
        "folded tokens": networks.conditioning(model, copies=512, redux=(6,)),
        "strength": weighed(networks.conditioning(model, copies=9), 0.3),
        "weights": weighed(several, 0.3, 1.0, 2.5),
        "a picture that does not count": weighed(several, 1.0, 0.0, 0.7),
        "fewer rows than ranks": networks.conditioning(model, copies=9, redux=(1,)),
        "text alone": weighed(networks.conditioning(model, copies=9, redux=(2,)), 0.0),
    }


@torch.inference_mode()
def test_steps_are_those_of_one_process(several, model):
    denoiser, one = several.denoiser(), networks.engine(model)
    img = networks.noise(model, GRID)
    for what, given in conditionings(model).items():
        prepared = denoiser.prepare(given, networks.SCHEDULE, GRID)
        alone = one.prepare(given, networks.SCHEDULE, GRID)
        for step in range(3):
            before = img.clone()
            velocity = prepared.predict(img, step)
            assert networks.error(velocity, alone.predict(img, step)) <= 1e-5, what
            assert torch.equal(img, before), what
        if all(each.log_weight == 0 for each in given.redux):
            assert networks.error(velocity, networks.oracle(model, given, GRID, img, 2)) <= 1e-5


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=needs_fp8 if "fp8" in kind else ()) for kind in ranks.KINDS],
)
@torch.inference_mode()
def test_all_operators_can_be_shared_out(several, model, kind):
    denoiser, one = several.denoiser(kind), ranks.engine(several.folder, kind)
    given, img = networks.conditioning(model, copies=9, redux=(6,)), networks.noise(model, GRID)
    shared = denoiser.prepare(given, networks.SCHEDULE, GRID).predict(img, 1)
    alone = one.prepare(given, networks.SCHEDULE, GRID).predict(img, 1)
    assert networks.error(shared, alone) <= 1e-5


@torch.inference_mode()
def test_each_row_of_a_batch_is_its_own_request(several, model):
    denoiser, one = several.denoiser(), networks.engine(model)
    given = [
        weighed(networks.conditioning(model, copies=9, seed=seed, guidance=guidance), 0.5)
        for seed, guidance in ((1, 3.5), (2, 1.0), (3, 9.0))
    ]
    prepared = [denoiser.prepare(each, networks.SCHEDULE, GRID) for each in given]
    together = denoiser.join([prepared[0], prepared[1], prepared[1], prepared[2]])
    img = networks.noise(model, GRID, batch=4)
    velocity = together.predict(img, 1)
    for index, owner in enumerate((0, 1, 1, 2)):
        single = img[index : index + 1]
        alone = one.prepare(given[owner], networks.SCHEDULE, GRID).predict(single, 1)
        assert networks.error(velocity[index : index + 1], alone) <= 1e-5


@torch.inference_mode()
def test_step_caches_decide_as_in_one_process(several, model):
    denoiser, one = several.denoiser(), networks.engine(model)
    schedule = Schedule(tuple(1 - step / 12 for step in range(13)))
    given = [networks.conditioning(model, copies=9, seed=seed) for seed in (1, 2)]
    counts = []
    for threshold in (0.4, 0.5, 0.8):
        tier = Tier(CachePolicy(threshold, warm_up=1, max_hits=3))
        runs = [
            each.join([each.prepare(one_of, schedule, GRID) for one_of in given]).start(tier)
            for each in (denoiser, one)
        ]
        img = networks.noise(model, GRID, batch=2)
        for step in range(12):
            shared, alone = (run.predict(img, step) for run in runs)
            assert networks.error(shared, alone) <= 1e-5
            assert runs[0].reused == runs[1].reused
            img = img - alone / 12
        counts.append(runs[0].reused)
    assert counts[0] < counts[1] < counts[2]  # so that there was something to decide


@torch.inference_mode()
def test_a_run_that_is_given_up_leaves_the_ranks_in_step(several, model):
    denoiser, one = several.denoiser(), networks.engine(model)
    given, img = networks.conditioning(model), networks.noise(model, GRID)
    expected = one.prepare(given, networks.SCHEDULE, GRID).predict(img, 2)
    for tier in (TIERS["exact"], TIERS["fast"]):
        run = denoiser.prepare(given, networks.SCHEDULE, GRID).start(tier)
        run.predict(img, 0)
        del run
        again = denoiser.prepare(given, networks.SCHEDULE, GRID)
        assert networks.error(again.predict(img, 2), expected) <= 1e-5


@torch.inference_mode()
def test_the_root_tells_what_it_needs_no_more(several, model, monkeypatch):
    denoiser, told = several.denoiser(), []
    send = several.followers.send
    monkeypatch.setattr(several.followers, "send", lambda each: (told.append(each), send(each)))
    prepared = denoiser.prepare(networks.conditioning(model), networks.SCHEDULE, GRID)
    joined = denoiser.join([prepared])
    run = joined.start(TIERS["fast"])
    run.predict(networks.noise(model, GRID), 0)
    kept = [each.number for each in told[:3]]
    assert not set(kept) & {number for each in told for number in each.forgotten}
    del run, joined, prepared
    gc.collect()
    denoiser.prepare(networks.conditioning(model), networks.SCHEDULE, GRID)
    assert set(kept) <= set(told[-1].forgotten)


class Kept:
    """Something a follower holds."""


def test_a_follower_forgets_what_the_root_does_not_need():
    made = []

    def join(parts):
        result = Kept()
        made.append(weakref.ref(result))
        return result

    told = [Told(Join(()), 0, ()), Told(Join((0,)), 1, ()), Told(Join((1,)), 2, (0, 7))]
    alive = []

    def next_told():
        alive.append([each() is not None for each in made])
        return told.pop(0)

    with pytest.raises(IndexError):
        follow(SimpleNamespace(join=join), next_told)
    assert alive[-2:] == [[True, True], [False, True, True]]


@torch.inference_mode()
def test_no_more_than_the_rows_of_each_head_is_sent(several, model, monkeypatch):
    denoiser, sent_bytes = several.denoiser(), []
    exchange, count = several.group.exchange, several.group.ranks

    def counted(send, sent, received):
        sent_bytes.append((sum(sent) - sent[0]) * send.element_size())
        return exchange(send, sent, received)

    given, img = networks.conditioning(model, copies=9, redux=(6,)), networks.noise(model, GRID)
    prepared = denoiser.prepare(given, networks.SCHEDULE, GRID)
    monkeypatch.setattr(several.group, "exchange", counted)
    prepared.predict(img, 0)
    txt, img_rows = 7, GRID.tokens
    own_txt, own_img = -(-txt // count), -(-img_rows // count)
    own, rows, width = own_txt + own_img, txt + img_rows, 4 * 16 // count * 4  # bytes
    whole = 3 * own * width * (count - 1) + (rows - own) * width
    last = (2 * own + own_img) * width * (count - 1) + (img_rows - own_img) * width
    scattered = (img_rows - own_img) * 16 * 4
    assert sum(sent_bytes) == 4 * whole + last + scattered


def broken(folder, **options):
    return ranks.Ranks(folder, [ranks.CPU, ranks.CPU], **options)


@torch.inference_mode()
@pytest.mark.parametrize(
    "how, reason",
    [
        (signal.SIGKILL, "rank 1 was killed by signal 9"),
        (signal.SIGSTOP, "Timed out"),
    ],
)
def test_a_rank_that_dies_or_hangs_is_a_device_error(folder, tmp_path, model, how, reason):
    ranks.save(model, tmp_path)
    pair = broken(tmp_path, timeout_s=3.0)
    run = pair.denoiser().prepare(networks.conditioning(model), networks.SCHEDULE, GRID)
    img = networks.noise(model, GRID)
    run.predict(img, 0)
    os.kill(pair.followers.pids[0], how)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=reason):
        run.predict(img, 1)
    assert time.monotonic() - started < 30
    with pytest.raises(DeviceError):  # for good
        run.predict(img, 2)
    assert not os.path.exists(f"/proc/{pair.followers.pids[0]}")


@torch.inference_mode()
def test_a_rank_without_memory_is_a_device_error(tmp_path, model):
    ranks.save(model, tmp_path)
    pair = broken(tmp_path)
    run = pair.denoiser(theirs="broken").prepare(
        networks.conditioning(model), networks.SCHEDULE, GRID
    )
    img = networks.noise(model, GRID)
    run.predict(img, 0)
    with pytest.raises(DeviceError, match="rank 1 failed: CUDA out of memory"):
        run.predict(img, 1)


def test_heads_that_do_not_divide_are_refused(several, tmp_path):
    ranks.save(networks.diffusers_model(num_attention_heads=3), tmp_path)
    with pytest.raises(ValueError, match=f"parallel={several.group.ranks} .* 3 attention heads"):
        ranks.ShardedEngine(ranks.engine(tmp_path, "torch"), several.group)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
@torch.inference_mode()
def test_gpus_compute_what_one_does(tmp_path, count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, and there are {torch.cuda.device_count()}")
    model = networks.diffusers_model(
        torch.bfloat16, num_attention_heads=4, attention_head_dim=128, axes_dims_rope=(16, 56, 56)
    )
    ranks.save(model, tmp_path)
    devices = [torch.device("cuda", rank) for rank in range(count)]
    several = ranks.Ranks(tmp_path, devices)
    try:
        denoiser, one = several.denoiser(), ranks.engine(tmp_path, "torch", devices[0])
        for what, given in conditionings(model).items():
            img = networks.noise(model, GRID).to(devices[0])
            shared, alone = (
                each.prepare(given, networks.SCHEDULE, GRID).predict(img, 1)
                for each in (denoiser, one)
            )
            assert networks.error(shared, alone) <= 2e-2, what
    finally:
        several.followers.close()
