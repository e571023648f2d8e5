"""The tokenizer: each word of the grammar a token, anything else survives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from companion.minis.captions import CAPTION_TOKENS, WORDS, caption_tokenizer, merges_of
from companion.minis.scenes import scene

TOKENIZER = caption_tokenizer()


def test_the_words_are_those_of_the_captions():
    said = {word for i in range(3000) for word in scene(4, i).caption.split()}
    assert said == set(WORDS)


def test_every_word_is_one_token_of_its_own():
    numbers = [TOKENIZER(word).input_ids for word in WORDS]
    assert {len(ids) for ids in numbers} == {3}  # start, word, end
    assert len({ids[1] for ids in numbers}) == len(WORDS)


def test_captions_survive_and_fit():
    for i in range(300):
        caption = scene(5, i).caption
        ids = TOKENIZER(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= CAPTION_TOKENS
        assert TOKENIZER.decode(ids, skip_special_tokens=True).strip() == caption
    assert TOKENIZER("A RED  star").input_ids == TOKENIZER("a red star").input_ids


@settings(max_examples=200)
@given(st.text(max_size=80))
def test_any_text_is_a_prompt(text):
    ids = TOKENIZER(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == CAPTION_TOKENS and min(ids) >= 0 and max(ids) < len(TOKENIZER)


@pytest.mark.parametrize("text", ["", "a zebra", "Ünïcode 🙂"])
def test_it_is_the_same_after_saving(tmp_path, text):
    tokenizer = caption_tokenizer(padding_side="left", longest=1024)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    padding = {"padding": "max_length", "max_length": 24}
    assert loaded(text, **padding).input_ids == tokenizer(text, **padding).input_ids
    assert tokenizer(text, **padding).input_ids[0] == tokenizer.pad_token_id  # on the left


@given(st.lists(st.text("abl", min_size=1, max_size=7), min_size=1, max_size=8, unique=True))
def test_learned_merges_rebuild_any_words(words):
    """Applied as a tokenizer applies them, always the earliest learned pair first."""
    ranks = {pair: rank for rank, pair in enumerate(merges_of(tuple(words)))}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)))
            assert (parts[first], parts[first + 1]) in ranks, (word, parts)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
