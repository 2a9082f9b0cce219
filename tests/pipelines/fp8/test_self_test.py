"""Where fp8 may run: hardware, dtypes, and a self-test that notices wrong numbers."""

import pytest
import torch

from fp8_products import needs_fp8
from redux_pipelines.fp8 import self_test
from redux_pipelines.fp8.linear import Fp8Linear
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.network.flux import DoubleBlock, SingleBlock
from stand_ins import NOT_COMPUTING, Computation, doing_nothing, fixing

CHANGES = {name: change for name, change in NOT_COMPUTING.items() if change is not doing_nothing}
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
WIDTH = 256


@pytest.fixture
def gpu(monkeypatch):
    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
        monkeypatch.setattr(self_test, "_run", lambda *_: None)

    return pretend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@needs_fp8
def test_a_cpu_passes(dtype):
    assert self_test.refusal(CPU, dtype, WIDTH) is None


def test_a_torch_without_products_of_rows_is_refused_on_a_cpu(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("scale_a.numel() == 1 INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    monkeypatch.setattr(self_test, "_cpu_refusal", self_test._cpu_refusal.__wrapped__)
    with pytest.raises(ValueError, match=r"lacks there: use torch 2\.13 or newer"):
        load_pipeline(model="tiny", device="cpu", transformer_dtype="fp8")


def test_the_self_test_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    self_test.refusal(CPU, torch.float32, WIDTH)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)], ids=str)
def test_gpus_without_e4m3_are_refused(gpu, capability):
    gpu(capability)
    reason = self_test.refusal(GPU, torch.bfloat16)
    assert reason == (
        "fp8 needs compute capability 8.9 (Ada, Hopper or newer), Pretended GPU has "
        f"{capability[0]}.{capability[1]}"
    )


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_gpus_with_e4m3_are_not(gpu, capability):
    gpu(capability)
    assert self_test.refusal(GPU, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("dtype", "width", "text"),
    [
        (torch.float16, 3072, "come out in bfloat16, and the dtype asked for is float16"),
        (torch.float32, 3072, "come out in bfloat16, and the dtype asked for is float32"),
        (torch.bfloat16, 40, "multiples of 16, and the model's is 40"),
    ],
)
def test_what_a_gpu_cannot_multiply_is_refused(gpu, dtype, width, text):
    gpu((9, 0))
    assert text in self_test.refusal(GPU, dtype, width)


def test_rocm_is_refused(gpu, monkeypatch):
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "built for ROCm" in self_test.refusal(GPU, torch.bfloat16)


def _break(monkeypatch, change):
    right = Fp8Linear.forward_quantized

    def wrong(self, q, row_scale, out_dtype, rows=slice(None)):
        return change(right(self, q, row_scale, out_dtype, rows), row_scale)

    monkeypatch.setattr(Fp8Linear, "forward_quantized", wrong)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda out, _: out * 1.03, "1 rows of 256 are off by 0.03 of the same numbers in float32"),
        (lambda out, _: out.roll(1, dims=-1), "are off by 1.4"),
        (lambda out, _: out * torch.nan, "are off by nan"),
        (lambda out, _: torch.where(out == out.max(), torch.inf, out), "are off by inf"),
        (lambda out, scale: out / scale * scale.mean(), "67 rows of 256 are off by"),
    ],
    ids=["scaled", "shifted", "nan", "inf", "one scale for all rows"],
)
@needs_fp8
def test_wrong_numbers_are_noticed(monkeypatch, change, text):
    _break(monkeypatch, change)
    reason = self_test.refusal(CPU, torch.float32, WIDTH)
    assert reason.startswith("the self-test of fp8 failed: ")
    assert text in reason


def _product(q, row_scale, weight, weight_scale, bias, rows, out_dtype):
    layer = Fp8Linear.__new__(Fp8Linear)
    torch.nn.Module.__init__(layer)
    layer.columns, layer.column_scale, layer.bias = (
        torch.nn.Parameter(each, requires_grad=False)
        for each in (weight.t(), weight_scale.t(), bias)
    )
    return RIGHT(layer, q, row_scale, out_dtype, rows)


RIGHT = Fp8Linear.forward_quantized
ARGUMENTS = ("q", "row_scale", "weight", "weight_scale", "bias", "rows")
PRODUCT = Computation(_product, (*ARGUMENTS, "out_dtype"))


def _verdict(monkeypatch, product):
    def forward(self, q, row_scale, out_dtype, rows=slice(None)):
        return product(q, row_scale, self.weight, self.weight_scale, self.bias, rows, out_dtype)

    monkeypatch.setattr(Fp8Linear, "forward_quantized", forward)
    return self_test.refusal(CPU, torch.float32, WIDTH)


@needs_fp8
def test_a_product_in_the_place_of_ours_passes(monkeypatch):
    assert _verdict(monkeypatch, _product) is None


@needs_fp8
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_product_that_does_not_compute_is_noticed(monkeypatch, change):
    assert "are off by" in _verdict(monkeypatch, change(PRODUCT))


@needs_fp8
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_product_that_ignores_an_argument_is_noticed(monkeypatch, argument):
    """It multiplies with the first one of that shape."""
    assert "self-test of fp8 failed" in _verdict(monkeypatch, fixing(argument, PRODUCT))


@needs_fp8
def test_a_product_of_another_dtype_is_noticed(monkeypatch):
    def product(*given):
        return _product(*given).double()

    assert "gives (1, 1, 768) torch.float64" in _verdict(monkeypatch, product)


@needs_fp8
def test_memory_that_holds_the_products_before_is_not_taken_for_new_ones(monkeypatch):
    """What was freed is given out again: it holds the result of some earlier call."""
    before = []

    def product(*given):
        before.append(_product(*given))
        return next(each for each in before if each.shape == before[-1].shape)

    assert "are off by" in _verdict(monkeypatch, product)


@pytest.mark.parametrize(
    ("width", "depths"), [(3072, (3072, 12288, 15360)), (256, (256, 1024, 1280))]
)
def test_products_are_as_deep_as_those_of_the_blocks(width, depths):
    with torch.device("meta"):
        double, single = DoubleBlock(width, 8), SingleBlock(width, 8)
        linears = [
            each
            for each in (*double.modules(), *single.modules())
            if isinstance(each, torch.nn.Linear)
        ]
    assert tuple(depth * width for depth in self_test.DEPTHS) == depths
    assert {each.in_features for each in linears} == set(depths)


@needs_fp8
@pytest.mark.parametrize("depth", self_test.DEPTHS)
def test_a_product_that_is_wrong_at_one_depth_is_noticed(monkeypatch, depth):
    """As where a library takes another algorithm for a longer sum."""

    def product(q, *rest):
        return _product(q, *rest) * (1.1 if q.shape[-1] == depth * WIDTH else 1.0)

    assert f"rows of {depth * WIDTH} are off by 0.1" in _verdict(monkeypatch, product)


@needs_fp8
def test_weights_quantised_too_coarsely_are_noticed(monkeypatch):
    def coarse(h):
        q, scale = self_test.quantize_rows(h)
        return (q.float() / 64).round().mul(64).to(q.dtype), scale

    monkeypatch.setattr("redux_pipelines.fp8.linear.quantize_rows", coarse)
    assert "of a product in float32" in _without_the_product(monkeypatch)


def _without_the_product(monkeypatch):
    """The first comparison shares the coarse rows' fault only in part: lift its bound."""
    monkeypatch.setattr(self_test, "MAX_ERROR", 10.0)
    return self_test.refusal(CPU, torch.float32, WIDTH)


@needs_fp8
def test_a_product_that_raises_is_a_reason(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED " + 1000 * "x")

    monkeypatch.setattr(Fp8Linear, "forward_quantized", fail)
    reason = self_test.refusal(CPU, torch.float32, WIDTH)
    assert "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" in reason
    assert len(reason) <= 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestOnAGpu:
    """On sm_89 and newer the real product passes; on older ones it is refused."""

    def test_the_self_test_passes_where_there_is_e4m3(self):
        has_e4m3 = torch.cuda.get_device_capability() >= (8, 9)
        reason = self_test.refusal(torch.device("cuda"), torch.bfloat16)
        assert (reason is None) == has_e4m3, reason

    @pytest.mark.parametrize("rows", [1, 16, 67, 1025, 5337])
    @pytest.mark.parametrize("shape", [(3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072)])
    def test_flux_products_are_those_of_the_cpu(self, rows, shape):
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs compute capability 8.9")
        width, out = shape
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size):
            made = torch.randn(size, generator=generator, device="cuda")
            return made.to(torch.bfloat16)

        fp8, x = Fp8Linear.of(draw(out, width) / width**0.5, draw(out)), draw(1, rows, width)
        q, scale = self_test.quantize_rows(x)
        weight = fp8.weight.float() * fp8.weight_scale
        want = torch.nn.functional.linear(q.float() * scale, weight, fp8.bias.float())
        got = fp8(x).float()
        assert float((got - want).norm() / want.norm()) <= self_test.max_error(width)
        part = fp8(x, slice(16, 1040)).float()
        assert float((part - got[..., 16:1040]).norm() / part.norm()) <= 1e-2

    def test_tiny_runs_in_fp8(self, request_for, finish):
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs compute capability 8.9")
        pipeline = load_pipeline(model="tiny", device="cuda", transformer_dtype="fp8")
        assert pipeline.info.dtype == "bfloat16 with fp8"
        assert finish(pipeline.generate(request_for())).images[0].size == (512, 512)
