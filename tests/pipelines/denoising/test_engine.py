"""Each image of a batch of several requests is that of its own."""

import pytest
import torch

from pipelines import networks
from redux_kernels import checks
from redux_pipelines.denoising.quality import CachePolicy, Tier
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, TorchOperators


@pytest.mark.parametrize("copies", [1, 9])
@pytest.mark.parametrize(
    "operators", [TorchOperators(), KernelOperators(), OneDnnOperators()], ids=lambda o: o.name
)
@torch.inference_mode()
def test_each_row_of_a_batch_is_its_own_request(operators, copies):
    model = networks.diffusers_model()
    denoiser, grid = networks.engine(model, operators=operators), networks.small_grid()
    given = [
        networks.conditioning(model, copies=copies, seed=seed, guidance=guidance)
        for seed, guidance in ((1, 3.5), (2, 1.0), (3, 9.0))
    ]
    prepared = [denoiser.prepare(each, networks.SCHEDULE, grid) for each in given]
    rows = [prepared[0], prepared[1], prepared[1], prepared[2]]
    img = networks.noise(model, grid, batch=4)
    before = img.clone()
    for step in range(3):
        together = denoiser.join(rows).predict(img, step)
        for index, (row, owner) in enumerate(zip(rows, (0, 1, 1, 2), strict=True)):
            one = img[index : index + 1]
            theirs = networks.oracle(model, given[owner], grid, one, step)
            assert networks.error(together[index : index + 1], row.predict(one, step)) <= 1e-5
            assert networks.error(together[index : index + 1], theirs) <= 1e-5
    assert torch.equal(img, before)


@torch.inference_mode()
def test_a_cached_run_of_a_batch_reuses_each_rows_own_work():
    model = networks.diffusers_model()
    denoiser, grid = networks.engine(model), networks.small_grid()
    tier = Tier(CachePolicy(float("inf"), 1, 9, 0))
    prepared = [
        denoiser.prepare(networks.conditioning(model, seed=seed), networks.SCHEDULE, grid)
        for seed in (1, 2)
    ]
    together = denoiser.join(prepared).start(tier)
    alone = [each.start(tier) for each in prepared]
    img = networks.noise(model, grid, batch=2)
    for step in range(3):
        velocity = together.predict(img, step)
        for index, single in enumerate(alone):
            one = single.predict(img[index : index + 1], step)
            assert networks.error(velocity[index : index + 1], one) <= 1e-5
    assert together.reused == alone[0].reused == 2


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_rows_of_different_layouts_are_refused(backend):
    model = networks.diffusers_model()
    denoiser = networks.engine(model) if backend == "engine" else networks.DiffusersDenoiser(model)
    grid = networks.small_grid()
    prepared = [
        denoiser.prepare(networks.conditioning(model, text=text), networks.SCHEDULE, grid)
        for text in (7, 4)
    ]
    with pytest.raises(ValueError, match="share a batch"):
        denoiser.join(prepared)


@pytest.fixture
def looked_at(monkeypatch):
    """Calls of operators whose tensors were looked at."""

    class Passed(set):
        def __contains__(self, key):
            calls.append(key)
            return super().__contains__(key)

    calls = []
    monkeypatch.setattr(checks, "_passed", Passed())
    return calls


@torch.inference_mode()
def test_a_requests_first_step_of_each_size_looks_at_all_tensors(looked_at):
    """No later one does: what its operators get follows from the image's rows."""
    model, grid = networks.diffusers_model(), networks.small_grid()
    denoiser = networks.engine(model, operators=KernelOperators())
    given = networks.conditioning(model, copies=9)
    prepared = denoiser.prepare(given, networks.SCHEDULE, grid)
    joined = denoiser.join([prepared, prepared])
    for each, batch in ((prepared, 1), (prepared, 2), (joined, 2)):
        img, calls = networks.noise(model, grid, batch=batch), []
        for step in range(3):
            looked_at.clear()
            each.predict(img, step)
            calls.append(len(looked_at))
        assert calls[0] > 20
        assert calls[1:] == [0, 0]


@torch.inference_mode()
def test_a_cached_runs_first_step_looks_at_all_tensors(looked_at):
    model, grid = networks.diffusers_model(), networks.small_grid()
    denoiser = networks.engine(model, operators=KernelOperators())
    given = networks.conditioning(model, copies=9)
    run = denoiser.prepare(given, networks.SCHEDULE, grid).start(Tier(CachePolicy(1.0, 1, 1, 0)))
    img = networks.noise(model, grid)
    for step in range(3):
        looked_at.clear()
        run.predict(img, step)
        assert (len(looked_at) > 20) == (step == 0)
    assert run.reused == 1
