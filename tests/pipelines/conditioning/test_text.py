"""Lazy loading, missing encoders and prompt lengths."""

import shutil

import pytest
import torch

from redux_pipelines.conditioning.text import TextEncoders, TextSizes
from redux_pipelines.errors import RequestError


@pytest.fixture
def without_text(tiny, tmp_path):
    shutil.copytree(tiny.base, tmp_path / "base", ignore=shutil.ignore_patterns("text_encoder_2"))
    return type(tiny)(tmp_path / "base", tiny.redux)


def _encoders(base, **config):
    sizes = {"guidance_embeds": True, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return TextEncoders(
        base,
        TextSizes.of({**sizes, **config}, base),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_an_empty_prompt_loads_no_text_encoder(tiny, load, request_for, finish):
    pipeline = load(tiny)
    finish(pipeline.generate(request_for()))
    assert not pipeline._components.text_encoders.is_loaded
    finish(pipeline.generate(request_for(prompt="a fox")))
    assert pipeline._components.text_encoders.is_loaded


@pytest.mark.parametrize("fields", [{"prompt": "a fox"}, {"empty_prompt": "encode"}], ids=str)
def test_a_prompt_without_encoders_says_what_is_missing(without_text, load, request_for, fields):
    pipeline = load(without_text)
    with pytest.raises(RequestError, match=r"text_encoder_2 .*send an empty prompt"):
        pipeline.generate(request_for(**fields))


def test_an_empty_prompt_works_without_encoders(
    without_text, load, pipeline, request_for, finish, difference
):
    request = request_for()
    ours = finish(load(without_text).generate(request)).images[0]
    assert difference(ours, finish(pipeline.generate(request)).images[0]) == 0


def test_no_prompt_is_one_zero_token_that_stands_for_all(tiny):
    txt, vec = _encoders(tiny.base).zeros()
    assert txt.values.shape == (1, 32)
    assert txt.expanded().shape == (64, 32)
    assert vec.shape == (32,)
    assert not txt.values.any()
    assert not vec.any()


@pytest.mark.parametrize(("guidance", "tokens"), [(True, 512), (False, 256)])
def test_prompts_are_as_long_as_the_model_was_trained_for(tmp_path, guidance, tokens):
    config = {
        "guidance_embeds": guidance,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
    }
    assert TextSizes.of(config, tmp_path) == TextSizes(4096, 768, tokens)


def test_a_smaller_tokenizer_shortens_the_prompt(tiny):
    config = {"guidance_embeds": True, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    assert TextSizes.of(config, tiny.base).tokens == 64


def test_long_prompts_are_cut_off(tiny):
    txt, vec = _encoders(tiny.base).encode("a long walk " * 50)
    assert txt.values.shape == (64, 32)
    assert vec.shape == (32,)


def test_saved_and_reloaded_encoders_say_the_same(tiny, tmp_path):
    encoders = _encoders(tiny.base)
    before = encoders.encode("a red fox")
    for name, parts in (("", encoders._clip), ("_2", encoders._t5)):
        parts[0].save_pretrained(tmp_path / f"tokenizer{name}")
        parts[1].save_pretrained(tmp_path / f"text_encoder{name}")
    after = _encoders(tmp_path).encode("a red fox")
    assert torch.equal(before[0].values, after[0].values)
    assert torch.equal(before[1], after[1])


def test_clip_gets_77_tokens_whatever_the_tokenizer_states(tiny):
    encoders = _encoders(tiny.base)
    tokenizer, *_ = encoders._clip
    tokenizer.model_max_length = 10**30
    assert encoders.encode("a " * 200)[1].shape == (32,)


@pytest.mark.parametrize("absent", [{}, {"guidance_embeds": None}], ids=["left out", "null"])
def test_a_model_whose_configuration_has_no_guidance_is_one_without(tiny, absent):
    sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    without = TextSizes.of({**sizes, "guidance_embeds": False}, tiny.base)
    assert TextSizes.of({**sizes, **absent}, tiny.base) == without
