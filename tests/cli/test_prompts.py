"""decm sample-prompts: images in GenEval's layout, resumed folders, and errors in a file of prompts."""

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from decm_lightning import cli
from decm_lightning.autoencoders import LatentCoder, load_autoencoder
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import DiT, TextDiT, save
from decm_lightning.samplers import mix
from decm_lightning.text import TextEncoder
from decm_lightning.text.prompts import Prompt, read_prompts
from decm_lightning.types import Captions
from tests.autoencoders.tiny import save_kl

LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"}',
    '{"tag": "counting",  "prompt": "zwei K\u00fche \u2028 \u725b"}',
]
NAMES = ("00000", "00001", "00002")
GENERATE = ("sample-prompts", "student", "--prompts", "prompts.jsonl", "--encoder", "encoder", "--per_prompt", "2")


def text_dit(seed: int) -> TextDiT:
    torch.manual_seed(seed)
    network = TextDiT(8, 3, 8, patch_size=4, width=48, depth=1, heads=2, end_time=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command in a folder with a tiny student, its tiny text encoder and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    save(text_dit(0), "student")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    Path("encoder").mkdir()
    Path("encoder/vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab="encoder/vocab.txt").save_pretrained("encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained("encoder")
    Path("prompts.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def scored(folder: Path) -> dict[str, tuple[dict, list[bytes]]]:
    """Read a folder as GenEval's evaluate_images.py does: numbered folders, one JSON each, samples named by digits."""
    found = {}
    for place in folder.iterdir():
        if not place.is_dir() or not place.name.isdigit():
            continue
        with (place / "metadata.jsonl").open(encoding="utf-8") as file:
            metadata = json.load(file)
        names = [name for name in sorted((place / "samples").iterdir()) if re.match(r"\d+\.png", name.name)]
        found[place.name] = metadata, [np.asarray(Image.open(name)).tobytes() for name in names]
    return found


def test_the_layout_is_what_genevals_scorer_reads(decm, tmp_path):
    assert decm(*GENERATE, "--out", "images")[0] == 0
    found = scored(tmp_path / "images")
    assert sorted(found) == ["00000", "00001", "00002"]
    assert [found[name][0] for name in sorted(found)] == [json.loads(line) for line in LINES]
    assert (tmp_path / "images/00000/metadata.jsonl").read_text() == LINES[0] + "\n"
    assert (tmp_path / "images/00000/samples/0001.png").is_file()
    assert Image.open("images/00000/samples/0001.png").size == (8, 8)
    images = [image for _, images in found.values() for image in images]
    assert len(set(images)) == 6


def test_images_are_the_students_for_the_encoded_prompt(decm):
    """Images are computed again from the network, the encoder and the sampler, with the noise of the command."""
    assert decm(*GENERATE, "--out", "images", "--steps", "2")[0] == 0
    noise = []
    plain = torch.randn

    def kept(*args, **kwargs):
        noise.append(plain(*args, **kwargs))
        return noise[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", kept)
        assert decm(*GENERATE, "--out", "again", "--steps", "2")[0] == 0
    captions = TextEncoder("encoder")([json.loads(LINES[1])["prompt"]])
    two = Captions(captions.tokens.expand(2, -1, -1), captions.mask.expand(2, -1))
    with torch.no_grad():
        made = mix(text_dit(0).eval(), torch.stack([part for part in noise if part.shape == (3, 8, 8)][2:4]), two, 2)
    expected = ((made + 1) * 127.5).round().clamp(0, 255)
    for folder in ("images", "again"):
        for row in range(2):
            image = torch.from_numpy(np.array(Image.open(f"{folder}/00001/samples/{row:04d}.png"))).permute(2, 0, 1)
            torch.testing.assert_close(image.float(), expected[row], atol=1, rtol=0)


def test_a_grid_shows_the_same_images_at_each_number_of_steps(decm, monkeypatch):
    seen = []
    monkeypatch.setattr("decm_lightning.cli.sample_prompts.save_named_grid", lambda *given: seen.append(given))
    assert decm(*GENERATE, "--out", "grid.png", "--steps", "[1, 3]")[0] == 0
    ((images, rows, columns, file),) = seen
    assert (rows[:2], columns, file) == (
        ["a photo of a bench", "a photo of a red cow"],
        ["mix, 1 step", "consistency, 3 steps"],
        Path("grid.png"),
    )
    for steps, part in ((1, images[:, :2]), (3, images[:, 2:])):
        assert decm(*GENERATE, "--out", f"files-{steps}", "--steps", str(steps))[0] == 0
        found = [image for _, images in map(scored(Path(f"files-{steps}")).get, NAMES) for image in images]
        assert found == [image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in part.flatten(0, 1)]


def test_what_is_there_is_not_drawn_again(decm, tmp_path):
    decm(*GENERATE, "--out", "whole", "--sampler", "consistency", "--steps", "2")
    expected = scored(tmp_path / "whole")
    decm(*GENERATE, "--out", "parts", "--sampler", "consistency", "--steps", "2")
    kept = tmp_path / "parts/00000/samples/0000.png"
    Image.new("RGB", (8, 8), "red").save(kept)
    red = kept.read_bytes()
    # As after a kill in the middle of a prompt, and after a lost image.
    (tmp_path / "parts/00001/metadata.jsonl").unlink()
    (tmp_path / "parts/00001/samples/0001.png").write_bytes(b"half an image")
    (tmp_path / "parts/00002/samples/0000.png").unlink()
    code, out, _ = decm(*GENERATE, "--out", "parts", "--sampler", "consistency", "--steps", "2")
    assert code == 0
    assert "wrote images of 2 prompts to parts (consistency, 2 steps); 1 of 3 existed" in out
    assert kept.read_bytes() == red
    kept.unlink()
    assert "images of 1 prompts" in decm(*GENERATE, "--out", "parts", "--sampler", "consistency", "--steps", "2")[1]
    assert scored(tmp_path / "parts") == expected


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, LINES[0].encode()[:-3], LINES[1].encode() + b"\n", b"\xff"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "samples/0001.png"])
def test_a_prompt_is_there_only_if_all_of_it_is_whole(decm, tmp_path, name, damage):
    """As after a full disk: a file of the right name with the beginning, or nothing, of its content."""
    decm(*GENERATE, "--out", "images")
    expected = scored(tmp_path / "images")
    file = tmp_path / "images/00000" / name
    file.write_bytes(damage if name.endswith("jsonl") else file.read_bytes()[: 100 - len(damage)])
    assert "images of 1 prompts to images (mix, 2 steps); 2 of 3 existed" in decm(*GENERATE, "--out", "images")[1]
    assert scored(tmp_path / "images") == expected
    assert "images of 0 prompts to images (mix, 2 steps); 3 of 3 existed" in decm(*GENERATE, "--out", "images")[1]


def test_an_image_of_another_size_or_a_foreign_one_is_not_taken(decm, tmp_path):
    decm(*GENERATE, "--out", "images")
    expected = scored(tmp_path / "images")
    Image.new("RGB", (16, 16)).save("images/00002/samples/0000.png")
    assert "images of 1 prompts to images (mix, 2 steps); 2 of 3" in decm(*GENERATE, "--out", "images")[1]
    assert scored(tmp_path / "images") == expected
    Image.new("RGB", (8, 8)).save("images/00002/samples/0002.png")
    code, _, err = decm(*GENERATE, "--out", "images")
    assert code == 2
    assert "images has other images (00002/samples/0002.png is not one of its samples)" in err


def test_prompts_that_are_cut_are_counted(decm, caplog, monkeypatch):
    monkeypatch.setattr(TextEncoder.__init__, "__defaults__", (12,))
    assert decm(*GENERATE, "--out", "images")[0] == 0
    assert [message for message in caplog.messages if "truncated" in message] == [
        "2 of 3 captions were truncated to 12 tokens"
    ]


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_out_of_range_is_refused_before_anything(decm, seed):
    Path("empty").mkdir()
    code, _, err = decm("sample-prompts", "empty", *GENERATE[2:], "--out", "images", "--seed", seed)
    assert code == 2
    assert err.endswith(f"decm: error: seed must be from 0 to 2**63 - 1: got {seed}\n")


def test_settings_that_are_empty_are_named(decm):
    Path("images").mkdir()
    Path("images/settings.json").touch()
    code, _, err = decm(*GENERATE, "--out", "images")
    assert code == 2
    assert "decm: error: images/settings.json is damaged (empty): remove the folder to start again" in err


@pytest.mark.parametrize("changed", ["steps", "seed", "weights", "prompts"])
def test_images_drawn_otherwise_are_not_mixed(decm, changed):
    decm(*GENERATE, "--out", "images")
    more = {"steps": ("--steps", "3"), "seed": ("--seed", "1")}.get(changed, ())
    if changed == "weights":
        save(text_dit(1), "student")
    if changed == "prompts":
        Path("prompts.jsonl").write_text("\n".join(LINES[:2]))
    code, _, err = decm(*GENERATE, "--out", "images", *more)
    assert code == 2
    assert "images has samples of other settings (" in err
    assert f"{changed}: " in err
    assert "choose another folder" in err


def test_plain_text_has_one_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffa cat\r\n eine "K\u00fche" \r\n'.encode())
    assert [prompt.text for prompt in read_prompts(file)] == ["a cat", 'eine "K\u00fche"']
    assert [json.loads(prompt.line)["prompt"] for prompt in read_prompts(file)] == ["a cat", 'eine "K\u00fche"']
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(LINES[2], encoding="utf-8")
    assert read_prompts(lines) == [Prompt(json.loads(LINES[2])["prompt"], LINES[2])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a cat\n\na dog\n", "p.txt, line 2: the prompt is empty"),
        ("p.txt", "", "p.txt is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl, line 2: invalid JSON"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl, line 1: the prompt is empty"),
        ("p.jsonl", '{"text": "a"}\n', 'p.jsonl, line 1: expected an object with {"prompt": "..."}'),
        ("p.jsonl", '["a"]\n', 'p.jsonl, line 1: expected an object with {"prompt": "..."}'),
        ("p.jsonl", '{"prompt": 3}\n', 'p.jsonl, line 1: expected an object with {"prompt": "..."}'),
        ("p.txt", b"caf\xe9\n", "p.txt is not text in UTF-8"),
        ("missing.txt", None, "no file of prompts at missing.txt"),
    ],
)
def test_a_bad_file_is_named_with_its_line(decm, name, content, message):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = decm(*GENERATE, "--prompts", name, "--out", "images")
    assert code == 2
    assert f"decm: error: {message}" in err
    assert len([line for line in err.splitlines() if line.startswith("decm: ")]) == 1
    assert not Path("images").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "student"], "student reads captions: use decm sample-prompts student"),
        ([*GENERATE[:4]], "text_encoder"),
        (["sample-prompts", "classes", *GENERATE[2:]], "classes reads classes: use decm sample classes"),
        (
            [*GENERATE, "--out", "prompts.jsonl"],
            "out must be a folder or a .png file that can be written: got prompts.jsonl",
        ),
        (["sample-prompts", "diverged", *GENERATE[2:], "--out", "a.png"], "images are not finite"),
        ([*GENERATE, "--out", "a", "--steps", "[1, 2]"], "got steps [1, 2] and out a"),
        (["sample", "classes", "--steps", "[1, 2]"], "steps: expected an integer"),
        ([*GENERATE, "--out", "a.png", "--steps", "[]"], "steps must be at least one number: got none"),
        ([*GENERATE, "--out", "a", "--per_prompt", "0"], "per_prompt must be at least 1: got 0"),
        ([*GENERATE, "--out", "a", "--steps", "0"], "steps must be at least 1: got 0"),
        ([*GENERATE, "--out", "a", "--encoder", "minilm"], "caption tokens must be (b, n, 8): got (2, 7, 384)"),
    ],
)
def test_bad_input_is_one_line(decm, argv, message):
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10), "classes")
    network = text_dit(0)
    torch.nn.init.constant_(network.final_layer.linear.bias, float("nan"))
    save(network, "diverged")
    code, _, err = decm(*argv)
    assert code == 2
    assert message in err
    assert not Path("a").exists()


def test_latents_of_captions_are_decoded_by_the_vaes_own_scaling(decm):
    torch.manual_seed(0)
    save(TextDiT(4, 2, 8, patch_size=2, width=16, depth=1, heads=2), "latent")
    vae = str(save_kl(Path("vae")))
    argv = ["sample-prompts", "latent", *GENERATE[2:], "--out", "images"]
    code, _, err = decm(*argv)
    assert code == 2
    assert "the model generates latents with 2 channels: give --vae, the VAE that encoded them" in err
    seen = []
    plain = LatentCoder.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentCoder, "decode", lambda self, x: seen.append(x) or plain(self, x))
        assert decm(*argv, "--vae", vae)[0] == 0
    expected = to_uint8(LatentCoder(load_autoencoder(vae)).decode(seen[0]))
    image = torch.from_numpy(np.array(Image.open("images/00000/samples/0000.png"))).permute(2, 0, 1)
    assert torch.equal(image, expected[0])
    assert image.shape == (3, 8, 8)
