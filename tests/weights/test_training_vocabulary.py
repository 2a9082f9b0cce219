"""Both tokenizers know every ASCII prompt, round trip, and survive saving."""

import pytest

from training import vocabulary
from training.captions import all_captions

NAMES = ("red apple", "flag france", "grinning face", "person running", "snow capped mountain")
PROMPT = "Flat icon of grinning face"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    captions = list(all_captions(NAMES))
    clip = vocabulary.learn_clip(captions, pieces=400, longest=16)
    t5 = vocabulary.learn_t5(captions, pieces=200, longest=16)
    vocabulary.save(folder, clip, t5)
    return (clip, t5), vocabulary.load(folder)


@pytest.mark.parametrize("which", [0, 1], ids=["clip", "t5"])
@pytest.mark.parametrize("prompt", [PROMPT, "", "Zebra & 7 quiz_words!"])
def test_saved_tokenizers_give_the_same_tokens(tokenizers, which, prompt):
    learnt, loaded = tokenizers
    assert learnt[which](prompt).input_ids == loaded[which](prompt).input_ids
    assert loaded[which].model_max_length == 16


@pytest.mark.parametrize(("which", "expected"), [(0, PROMPT.lower()), (1, PROMPT)])
def test_a_prompt_comes_back_from_its_tokens(tokenizers, which, expected):
    tokenizer = tokenizers[1][which]
    ids = tokenizer(PROMPT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == expected


def test_known_words_are_few_tokens(tokenizers):
    clip, t5 = tokenizers[1]
    assert len(clip("flat icon").input_ids) <= 6
    assert len(t5("flat icon").input_ids) <= 6


def test_no_ascii_character_is_unknown_to_t5(tokenizers):
    t5 = tokenizers[1][1]
    prompt = "".join(chr(code) for code in range(33, 127))
    assert t5.unk_token_id not in t5(prompt).input_ids


def test_special_tokens_are_where_the_encoders_expect_them(tokenizers):
    clip, t5 = tokenizers[1]
    assert clip("").input_ids == [len(clip) - 2, len(clip) - 1]
    assert (t5.pad_token_id, t5.eos_token_id) == (0, 1)
