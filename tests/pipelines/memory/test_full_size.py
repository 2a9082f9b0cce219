"""FLUX.1's own sizes: planned from files everywhere, run on a GPU that is held to 24 GB."""

import pytest
import torch

from pipelines import full_size
from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.memory.cards import CONTEXT_BYTES, GIB, USABLE_GIB, sold_as
from redux_pipelines.memory.model_sizes import FLUX_DEV, read_sizes
from redux_pipelines.memory.plan import Options, largest_demand, plan
from redux_weights.layout import find_missing

LARGEST = {"width": 1536, "height": 1536, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    return full_size.write_checkpoint(tiny, tmp_path_factory.mktemp("full"))


def test_files_of_full_size_are_read_as_what_the_planner_knows_by_heart(checkpoint):
    assert not find_missing(*checkpoint)
    sizes = read_sizes(*checkpoint)
    assert sizes == FLUX_DEV
    options = Options(demand=largest_demand(sizes))
    assert plan(sizes, sold_as(24), options) == plan(FLUX_DEV, sold_as(24), Options())


@pytest.fixture
def held_to(request):
    """Let this process have no more of the GPU than a card sold with so many GB gives it."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(USABLE_GIB[request.param] * GIB) - CONTEXT_BYTES
    if torch.cuda.mem_get_info(device)[0] < limit:
        pytest.skip(f"the GPU has less than {limit / 1e9:.1f} GB free")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("held_to", "mode"), [(24, "evict"), (16, "offload"), (12, "offload")], indirect=["held_to"]
)
def test_the_largest_request_in_bfloat16_fits(held_to, mode, checkpoint, picture, finish):
    base, redux = checkpoint
    pipeline = load_pipeline(base=base, redux=redux, device="cuda", dtype="bfloat16")
    made = pipeline._components.plan
    assert made.mode == mode
    assert made.fits
    for prompt in ("", "a fox", "a bear"):
        torch.cuda.reset_peak_memory_stats()
        request = GenerationRequest(picture, prompt=prompt, **LARGEST)
        assert finish(pipeline.generate(request)).images[0].size == (1536, 1536)
        assert torch.cuda.max_memory_allocated() <= made.peak_bytes
        assert torch.cuda.max_memory_reserved() <= held_to
    stays = made.resident_bytes - sum(p.size_bytes for p in made.parts if p.name == "caches")
    assert torch.cuda.memory_allocated() == pytest.approx(stays, rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("held_to", [24], indirect=True)
def test_everything_resident_does_not_fit_24_gb(held_to, checkpoint):
    base, redux = checkpoint
    with pytest.raises(MemoryPlanError, match="used up while the weights were loaded"):
        load_pipeline(base=base, redux=redux, device="cuda", dtype="bfloat16", memory="resident")
