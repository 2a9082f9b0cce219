"""Two real tokenizers of about a thousand pieces each: CLIP's byte-pair kind and T5's unigrams.

Both are learnt from the captions the model is trained with, and know every ASCII character, so any
prompt has tokens. Knows no models.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

CLIP_PIECES = 1024
T5_PIECES = 1024
_START, _END = "<|startoftext|>", "<|endoftext|>"
_ASCII = [chr(code) for code in range(33, 127)]


def learn_clip(captions: Iterable[str], pieces: int, longest: int) -> CLIPTokenizer:
    """A CLIP tokenizer with up to ``pieces`` tokens for prompts of ``longest`` of them."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, end_of_word_suffix="</w>", initial_alphabet=_ASCII, show_progress=False
    )
    learner.train_from_iterator([caption.lower() for caption in captions], trainer)
    merges = _merges(learner)
    letters = _byte_letters()
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += [left + right for left, right in merges]
    names = [*dict.fromkeys(names), _START, _END]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest)


def _merges(learner: Tokenizer) -> Any:
    """Pairs of pieces, which CLIPTokenizer's annotations do not foresee."""
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def learn_t5(captions: Iterable[str], pieces: int, longest: int) -> T5Tokenizer:
    """A T5 tokenizer with up to ``pieces`` tokens for prompts of ``longest`` of them."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    learner.train_from_iterator(list(captions), trainer)
    learnt = _unigrams(learner)
    lowest = min(score for _, score in learnt)
    known = {piece for piece, _ in learnt}
    rest = [(letter, lowest - 1) for letter in ("▁", *_ASCII) if letter not in known]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *learnt, *rest], extra_ids=0, model_max_length=longest)


def _unigrams(learner: Tokenizer) -> list[tuple[str, float]]:
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocabulary if piece != "<unk>"]


def save(folder: Path, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    """Write ``folder/tokenizer`` and ``folder/tokenizer_2``."""
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")


def load(folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The tokenizers that ``save`` wrote."""
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return clip, T5Tokenizer.from_pretrained(folder / "tokenizer_2")
