"""Which mode a card gets, that its numbers add up, and what is said when nothing fits."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from redux_pipelines.conditioning import image
from redux_pipelines.conditioning import text as text_module
from redux_pipelines.denoising import engine
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.memory import plan as plan_module
from redux_pipelines.memory.activations import Demand
from redux_pipelines.memory.cards import UNSEEN_BYTES, Card, sold_as
from redux_pipelines.memory.model_sizes import FLUX_DEV, FLUX_SCHNELL
from redux_pipelines.memory.plan import Options, Placement, largest_demand, plan, spread

BF16, FP8 = Options(), Options(is_fp8=True)

GOLDEN = {  # card, options: mode, streamed blocks, resident and peak in MB, T5's place
    (12, "bf16"): ("offload", 34, 8_657, 10_610, Placement.STREAMED),
    (16, "bf16"): ("offload", 18, 13_414, 15_367, Placement.STREAMED),
    (24, "bf16"): ("evict", 0, 18_931, 20_884, Placement.STREAMED),
    (48, "bf16"): ("resident", 0, 35_196, 37_149, Placement.GPU),
    (80, "bf16"): ("resident", 0, 35_196, 37_149, Placement.GPU),
    (12, "fp8"): ("offload", 8, 8_666, 11_240, Placement.STREAMED),
    (16, "fp8"): ("evict", 0, 10_332, 12_906, Placement.STREAMED),
    (24, "fp8"): ("evict", 0, 10_332, 12_906, Placement.STREAMED),
    (48, "fp8"): ("resident", 0, 26_598, 29_172, Placement.GPU),
    (80, "fp8"): ("resident", 0, 26_598, 29_172, Placement.GPU),
}


@pytest.mark.parametrize(("key", "expected"), GOLDEN.items(), ids=str)
def test_plan_of_a_card(key, expected):
    gigabytes, kind = key
    made = plan(FLUX_DEV, sold_as(gigabytes), FP8 if kind == "fp8" else BF16)
    got = (round(each / 1e6) for each in (made.resident_bytes, made.peak_bytes))
    assert (made.mode, len(made.streamed_blocks), *got, made.placement_of("T5")) == expected
    assert made.fits
    assert made.largest_side == 1536


def test_bfloat16_on_24_gb_without_the_modulation_and_t5():
    """The sum by hand: parameters of the parts, two bytes each, that stay."""
    made = plan(FLUX_DEV, sold_as(24), BF16)
    stay = 11_901_408_320 - 3_247_448_064 + 428_225_600 + 64_503_808 + 83_819_683
    assert made.resident_bytes == 2 * stay + plan_module.CACHE_BYTES
    host = 2 * (3_247_448_064 + 4_762_310_656 + 123_060_480)
    assert made.host_bytes == int(plan_module.HOST_SHARE * host)
    assert 1.5e9 < made.headroom_bytes < 2e9


def test_everything_is_counted_once():
    made = plan(FLUX_DEV, sold_as(80), BF16)
    assert made.resident_bytes == 2 * FLUX_DEV.parameters + plan_module.CACHE_BYTES
    assert made.host_bytes == 0


def test_a_card_of_32_gb_keeps_the_text_encoders():
    made = plan(FLUX_DEV, sold_as(32), FP8)
    assert (made.mode, made.placement_of("T5")) == ("resident", Placement.GPU)
    roomy = plan(FLUX_DEV, Card("36 GB", 36 * 10**9), BF16)
    assert (roomy.mode, roomy.placement_of("T5")) == ("evict", Placement.GPU)
    assert roomy.placement_of("modulation") is Placement.STREAMED


def test_caches_count_with_their_limits():
    limits = (
        text_module.CACHE_BYTES,
        image.CACHE_BYTES,
        engine.MODULATION_CACHE_BYTES,
        engine.ROPE_CACHE_BYTES,
    )
    assert sum(limits) == plan_module.CACHE_BYTES


def test_offload_streams_no_more_than_it_must():
    card = sold_as(12)
    made = plan(FLUX_DEV, card, BF16)
    tried = list(plan_module._candidates(FLUX_DEV, card, BF16, "offload"))
    fewer = [each for each in tried if len(each.streamed_blocks) < len(made.streamed_blocks)]
    assert fewer
    assert not any(each.fits for each in fewer)


@pytest.mark.parametrize("count", [1, 3, 57])
def test_streamed_blocks_are_spread(count):
    for chosen in range(count + 1):
        picked = spread(chosen, count)
        assert len(picked) == len(set(picked)) == chosen
        gaps = [b - a for a, b in pairwise(picked)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_picture_too_large_to_decode_whole_is_to_be_cut():
    made = plan(FLUX_DEV, sold_as(12), BF16)
    assert 1024**2 < made.tile_above_pixels < 1536**2
    assert plan(FLUX_DEV, sold_as(80), BF16).tile_above_pixels == 1536**2


budgets = st.integers(2 * 10**9, 90 * 10**9)
options = st.builds(
    Options,
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.booleans(),
    st.builds(Demand, st.integers(512, 1536), st.integers(512, 1536), st.integers(1, 4)),
)
models = st.sampled_from([FLUX_DEV, FLUX_SCHNELL, replace(FLUX_DEV, t5=None, clip=None)])


def _plan(model, budget, chosen):
    try:
        return plan(model, Card("a card", budget), chosen)
    except MemoryPlanError:
        return None


def _speed(made):
    """Larger is slower."""
    if made is None:
        return (9,)
    order = plan_module.MEMORY_MODES.index(made.mode)
    return (order, made.placement_of("T5") is Placement.STREAMED, len(made.streamed_blocks))


@settings(max_examples=40, deadline=None)
@given(models, budgets, budgets, options)
def test_more_memory_never_gives_a_slower_plan(model, first, second, chosen):
    less, more = sorted([first, second])
    assert _speed(_plan(model, more, chosen)) <= _speed(_plan(model, less, chosen))


@settings(max_examples=40, deadline=None)
@given(models, budgets, options)
def test_a_plan_that_fits_stays_within_the_card(model, budget, chosen):
    made = _plan(model, budget, chosen)
    assume(made is not None)
    assert made.resident_bytes < made.peak_bytes
    assert made.fits == (made.peak_bytes <= budget)
    assert made.headroom_bytes == budget - made.peak_bytes
    buffers = sum(part.size_bytes for part in made.parts if part.name == "block buffers")
    weights = sum(part.size_bytes for part in made.parts) - plan_module.CACHE_BYTES - buffers
    on_host = sum(p.size_bytes for p in made.parts if p.placement is not Placement.GPU)
    assert made.host_bytes == int(plan_module.HOST_SHARE * on_host)
    element = chosen.element_bytes
    blocks = model.transformer.blocks
    sizes = [each.size_bytes(element, is_fp8=chosen.is_fp8) for each in blocks]
    rest = model.parameters - sum(each.parameters for each in blocks)
    assert weights == sum(sizes) + element * rest


@settings(max_examples=40, deadline=None)
@given(models, budgets, options, st.integers(0, 512), st.integers(0, 2))
def test_a_larger_request_never_takes_less(model, budget, chosen, wider, more):
    made = _plan(model, budget, chosen)
    larger = replace(
        chosen.demand,
        width=min(chosen.demand.width + wider, 1536),
        batch=chosen.demand.batch + more,
    )
    other = _plan(model, budget, replace(chosen, demand=larger))
    assert _speed(other) >= _speed(made)
    if made is not None and other is not None and _speed(other) == _speed(made):
        assert other.peak_bytes >= made.peak_bytes


def test_a_mode_that_is_asked_for_is_taken_and_its_shortage_told():
    made = plan(FLUX_DEV, sold_as(24), BF16, "resident")
    assert made.mode == "resident"
    assert not made.fits
    assert "1 image(s) of 1536x1536 would take 37.1 GB with --memory resident" in made.shortage
    assert "14.6 GB more than a 24 GB card has; what fits is nothing" in made.shortage


def test_a_mode_that_is_asked_for_may_be_slower_than_need_be():
    made = plan(FLUX_DEV, sold_as(80), BF16, "evict")
    assert (made.mode, made.placement_of("T5")) == ("evict", Placement.GPU)
    assert len(plan(FLUX_DEV, sold_as(80), BF16, "offload").streamed_blocks) == 4


def test_where_only_smaller_pictures_fit_the_plan_says_how_small():
    made = plan(FLUX_DEV, Card("a card", 3_500_000_000), BF16)
    assert (made.mode, made.fits) == ("offload", False)
    assert 512 <= made.largest_side < 1536
    assert f"what fits is {made.largest_side}x{made.largest_side}" in made.shortage
    demand = replace(BF16.demand, width=made.largest_side, height=made.largest_side)
    assert plan(FLUX_DEV, made.card, replace(BF16, demand=demand)).fits


@pytest.mark.parametrize(("images", "pictures"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])
def test_what_the_plan_has_no_room_for_is_refused_and_nothing_else(images, pictures):
    """The border is where a plan for that very demand stops to fit."""
    demand = replace(largest_demand(FLUX_DEV), batch=4)
    made = plan(FLUX_DEV, Card("a card", 3_500_000_000), replace(BF16, demand=demand), "offload")
    side = made.largest_sides[pictures - 1][images - 1]
    assert 512 <= side < 1536

    def fits(width, height):
        rows = pictures * demand.redux_rows
        one = replace(demand, width=width, height=height, batch=images, redux_rows=rows)
        return plan(FLUX_DEV, made.card, replace(BF16, demand=one), "offload").fits

    assert fits(side, side)
    assert not fits(side + 64, side + 64)

    def refusal(width, height, multiple=1):
        return made.refusal(width, height, images, pictures=pictures, multiple=multiple)

    assert refusal(side, side) is None
    assert refusal(side + 64, side - 80) is None  # fewer pixels
    assert refusal(side - 1, side - 1, 16) is None
    reason = refusal(side + 64, side + 64)
    several = f" from {pictures} pictures" if pictures > 1 else ""
    assert f"{images} image(s) at once of {side + 64}x{side + 64}{several} need more" in reason
    assert ("take fewer pictures or a smaller redux_pooling" in reason) is (pictures > 1)
    assert f"a card has. Its memory plan (offload) has room for up to {side}x{side}" in reason
    assert ("a lower --max-batch-size" in reason) is (images > 1)
    assert "--memory offload" not in reason  # it is already
    assert "--transformer-dtype fp8 or a larger card" in reason
    assert refusal(side + 1, side, 16)  # it is rendered larger


def test_more_images_at_once_and_of_more_pictures_must_be_smaller_ones():
    demand = replace(largest_demand(FLUX_DEV), batch=4)
    options = replace(BF16, demand=demand)
    sides = plan(FLUX_DEV, Card("a card", 3_500_000_000), options, "offload").largest_sides
    for line in (*sides, *zip(*sides, strict=True)):
        assert list(line) == sorted(line, reverse=True)
    assert sides[0][0] > sides[0][3] > 0
    assert sides[0][1] > sides[3][1] > 0
    assert plan(FLUX_DEV, sold_as(80), options).largest_sides == ((1536,) * 4,) * 4


def test_a_mode_given_by_name_that_has_no_room_at_all_says_which_has():
    made = plan(FLUX_DEV, sold_as(24), BF16, "resident")
    reason = made.refusal(512, 512)
    assert "Its memory plan (resident) has room for none of any size" in reason
    assert "run the model with --memory offload (with --backend engine) or" in reason
    fp8 = plan(FLUX_DEV, sold_as(16), FP8, "resident").refusal(512, 512)
    assert "fp8" not in fp8


@pytest.mark.parametrize(
    ("chosen", "says", "never"),
    [(BF16, "use weights in fp8", "with fp8"), (FP8, "bfloat16 with fp8", "use weights in fp8")],
    ids=["bf16", "fp8"],
)
def test_a_card_that_is_too_small_for_anything_is_refused_with_numbers(chosen, says, never):
    with pytest.raises(MemoryPlanError) as raised:
        plan(FLUX_DEV, Card("a toy", 10**9), chosen)
    text = str(raised.value)
    assert "a toy has 1.0 GB to use" in text
    assert "512x512 pixels" in text
    assert "a larger card or --device cpu" in text
    assert says in text
    assert never not in text


def test_a_mode_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="memory='swap' is not one of auto, resident, evict"):
        plan(FLUX_DEV, sold_as(24), BF16, "swap")


def test_the_largest_batch_is_the_largest():
    made = plan(FLUX_DEV, sold_as(24), BF16)

    def fits(batch):
        demand = Demand(1024, 1024, batch)
        return plan(FLUX_DEV, made.card, replace(BF16, demand=demand), "evict").fits

    assert fits(made.largest_batch)
    assert not fits(made.largest_batch + 1)


def test_a_plan_is_described_part_by_part():
    made = plan(FLUX_DEV, sold_as(12), BF16)
    text = made.describe()
    assert text.startswith("bfloat16, offload, 34 blocks streamed: 8.7 GB on the GPU, peak 10.6 GB")
    for part in made.parts:
        assert f"  {part.name}: " in text
    assert "  T5: 9.5 GB, streamed" in text
    assert "  peak of denoise: " in text


def test_without_text_encoders_no_prompt_is_counted():
    model = replace(FLUX_DEV, t5=None, clip=None)
    assert largest_demand(model).text_rows == 1
    made = plan(model, sold_as(24), replace(BF16, demand=largest_demand(model)))
    assert made.placement_of("T5") is None
    assert "text" not in made.stages


# --- CUDA graphs ----------------------------------------------------------------------------------

CARDS = [
    (size, kind, batch) for size in (16, 24, 48, 80) for kind in (BF16, FP8) for batch in (1, 2)
]


@pytest.mark.parametrize("wanted", ["auto", 1, 8, 64])
@pytest.mark.parametrize(("gigabytes", "kind", "batch"), CARDS, ids=str)
def test_nothing_is_given_up_for_cuda_graphs(gigabytes, kind, batch, wanted):
    bare = replace(kind, demand=largest_demand(FLUX_DEV, batch))
    without = plan(FLUX_DEV, sold_as(gigabytes), bare)
    made = plan(FLUX_DEV, sold_as(gigabytes), replace(bare, cuda_graphs=wanted))
    assert made.largest_sides == without.largest_sides
    assert (made.mode, made.fits) == (without.mode, without.fits)
    assert min(without.tile_above_pixels, 1024**2) <= made.tile_above_pixels
    graphs = [part for part in made.parts if part.name == "CUDA graphs"]
    assert len(graphs) == (made.graphs.shapes > 0)
    assert made.resident_bytes == without.resident_bytes + sum(part.size_bytes for part in graphs)
    assert made.graphs.shapes <= (8 if wanted == "auto" else wanted)
    assert made.graphs.shapes == 0 or not made.streamed_blocks


@pytest.mark.parametrize("kind", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_24_gb_card_has_room_for_cuda_graphs_too(kind):
    made = plan(FLUX_DEV, sold_as(24), replace(kind, cuda_graphs="auto"))
    assert (made.mode, made.fits, made.graphs.shapes) == ("evict", True, 8)
    assert "CUDA graphs" in made.describe()


def test_nobody_is_told_of_graphs_that_were_not_asked_for():
    assert plan(FLUX_DEV, sold_as(80), BF16).graphs is None


def test_by_default_graphs_are_of_sizes_where_they_gain_something():
    """512 tokens of text and a picture's 729 with those of the image, filled up to 16."""
    card = sold_as(80)
    for kind, tokens in ((BF16, 48 * 48), (FP8, 64 * 64)):
        rows = plan(FLUX_DEV, card, replace(kind, cuda_graphs="auto")).graphs.rows
        assert 0 <= rows - (512 + 729 + tokens) < 16
    numbered = plan(FLUX_DEV, card, replace(BF16, cuda_graphs=3)).graphs
    assert numbered.shapes == 3
    assert 0 <= numbered.rows - (512 + 729 + 96 * 96) < 16


def test_a_card_with_little_room_gets_fewer_graphs():
    shapes = []
    for spare in range(0, 1_700_000_000, 50_000_000):
        bare = plan(FLUX_DEV, Card("large", 10**11), BF16, "evict")
        card = Card("a card", bare.peak_bytes + spare)
        made = plan(FLUX_DEV, card, replace(BF16, cuda_graphs="auto"), "evict")
        shapes.append(made.graphs.shapes)
        assert made.headroom_bytes >= min(spare, UNSEEN_BYTES)
    assert shapes == sorted(shapes)
    assert set(shapes) == {0, 1, 2, 4, 8}
