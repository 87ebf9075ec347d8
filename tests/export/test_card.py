"""The model card: its values come from the record, and the license is never invented."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from decm_lightning import cli
from decm_lightning.export.card import Samples, write_card
from decm_lightning.export.licenses import UNKNOWN, License, license_of
from decm_lightning.networks import MLP, DiT, save
from decm_lightning.networks.record import Record, Reference
from decm_lightning.teachers import DiffusersTeacher
from tests.export.lora_cases import case

__all__ = ["case"]
SD = "stabilityai/stable-diffusion-3.5-medium"
QUALITY = {
    "metric": "Fréchet distance on DigitsFeatures",
    "protocol": {"generated images": 1797, "seed": 3},
    "rows": [
        {"model": "student", "sampler": "mix", "steps": 2, "options": {"s1": 0.6}, "nfe": 2.0, "fd": 0.30612, "kid": 1},
        {"model": "teacher", "sampler": "euler", "steps": 50, "nfe": None, "fd": 0.2, "kid": 0.0},
    ],
}
RECORD = Record(
    teacher=Reference(SD, "0123456789abcdef"),
    guidance={"scale": 6.7, "limit": None, "interval": [0.1, 1.0]},
    objective="DE-CM",
    steps=12345,
    sampling={4: "consistency", 1: "mix"},
    quality=QUALITY,
    data=Reference("uoft-cs/cifar10", "feed", "CC-BY-4.0"),
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    network.record = RECORD
    return network


def card(network, folder, to="folder", **options) -> ModelCard:
    folder.mkdir(exist_ok=True)
    files = write_card(network, folder, to, options.pop("samples", None), **options)
    assert files[0] == folder / "README.md"
    return ModelCard.load(folder / "README.md")


def test_the_front_matter_has_the_base_and_its_license(network, tmp_path):
    data = card(network, tmp_path).data.to_dict()
    assert data["base_model"] == SD
    assert (data["license"], data["license_name"]) == ("other", "stabilityai-ai-community")
    assert data["license_link"].endswith("/LICENSE.md")
    assert data["library_name"] == "decm-lightning"
    assert {"few-step", "class-conditional"} <= set(data["tags"])


def test_the_text_has_every_value_of_the_record(network, tmp_path):
    text = card(network, tmp_path).text
    for value in (SD, "0123456789abcdef", "scale 6.7", "DE-CM", "12,345", "uoft-cs/cifar10", "cc-by-4.0"):
        assert value in text
    assert "| student | mix?s1=0.6 | 2 | 2 | 0.3061 | 1 |" in text
    assert "| teacher | euler | 50 | - | 0.2 | 0 |" in text
    assert "- generated images: 1797" in text
    assert "| 1 | `mix` |\n| 4 | `consistency` |" in text


def test_what_is_not_recorded_is_unknown(network, tmp_path):
    network.record = None
    found = card(network, tmp_path)
    assert found.data.license == "unknown"
    assert found.data.base_model is None
    for name in ("teacher", "guidance", "objective", "training steps", "data", "this model"):
        assert f"- {name}: unknown" in found.text
    assert "Not measured" in found.text
    assert "| 50 | `euler` |" in found.text
    assert "not measured with this model" in found.text


def test_a_teacher_without_a_name_is_unknown(network, tmp_path):
    network.record = replace(RECORD, teacher=Reference("", "0123456789abcdef"))
    found = card(network, tmp_path)
    assert (found.data.license, found.data.base_model) == ("unknown", None)


def test_a_folder_is_not_a_base_model_of_the_hub(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    network.record = replace(RECORD, teacher=Reference("weights/teacher", "abc", "MIT"))
    found = card(network, tmp_path / "student")
    assert found.data.base_model is None
    assert found.data.license == "mit"
    assert "`weights/teacher` (abc)" in found.text


def test_samples_are_a_grid_with_a_row_for_each_number_of_steps(network, tmp_path):
    images = torch.randint(0, 256, (3, 2, 1, 8, 8), dtype=torch.uint8)
    found = card(network, tmp_path, samples=Samples(images, (1, 2, 4), ["zero", "one"]))
    assert "(samples.png)" in found.text
    assert "zero, one" in found.text
    grid = Image.open(tmp_path / "samples.png")
    assert grid.size == (2 * 64, 3 * 64)
    assert grid.getpixel((64, 128)) == images[2, 1, 0, 0, 0]


def test_a_single_file_has_a_card_of_its_own_name(network, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    out = tmp_path / "student.safetensors"
    images = torch.zeros(1, 1, 1, 8, 8, dtype=torch.uint8)
    files = write_card(network, out, "safetensors", Samples(images, (1,), ["zero"]))
    assert files == [tmp_path / "student.md", tmp_path / "student.png"]
    assert "(student.png)" in files[0].read_text()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_is_replaced_until_its_mark_is_removed(network, tmp_path):
    card(network, tmp_path)
    network.record = replace(RECORD, steps=777)
    assert "777" in card(network, tmp_path).text
    mine = "\n".join(line for line in (tmp_path / "README.md").read_text().splitlines() if "<!--" not in line)
    (tmp_path / "README.md").write_text(mine)
    assert write_card(network, tmp_path, "folder", None) == []
    assert (tmp_path / "README.md").read_text() == mine


def test_the_python_lines_of_a_card_run(network, tmp_path):
    """Of a folder and of a single file."""
    from decm_lightning.export import writer

    for to, name in (("folder", "student"), ("safetensors", "student.safetensors")):
        out = tmp_path / name
        writer(to)(network, out, torch.float32)
        text = write_card(network, out, to, None)[0].read_text()
        scope: dict[str, object] = {}
        exec(text.partition("```python\n")[2].partition("```")[0], scope)
        assert [image.size for image in scope["images"]] == [(8, 8)]


@pytest.mark.parametrize(
    ("to", "library", "named"),
    [
        ("folder", "decm-lightning", '"someone/student"'),
        ("safetensors", "decm-lightning", 'hf_hub_download("someone/student", "out.safetensors")'),
        ("diffusers", "diffusers", "DiffusionPipeline"),
        ("lora", "diffusers", "load_lora_weights"),
        ("lora-comfyui", None, "LoraLoaderModelOnly"),
    ],
)
def test_each_format_says_how_it_is_run_from_the_hub(to, library, named, network, tmp_path):
    out = tmp_path / ("out" if to in ("folder", "diffusers") else "out.safetensors")
    text = write_card(network, out, to, None, "someone/student")[0].read_text()
    found = ModelCard(text)
    assert found.data.library_name == library
    assert named in found.text
    assert "# student\n" in found.text
    assert ("lora" in found.data.tags) == to.startswith("lora")


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_a_student_of_sd35_has_its_license_in_every_format(case, tmp_path, monkeypatch, capsys):
    """The weights of the base are in a folder of this name; it is tiny and random."""
    place = tmp_path / "stable-diffusion-3.5-medium"
    place.mkdir()
    for part in list(tmp_path.iterdir()):
        if part != place:
            part.rename(place / part.name)
    student = DiffusersTeacher(str(place), latent_size=4).network.with_end_time(lora_rank=2)
    save(student, tmp_path / "student")
    for to, out, card_of in (("lora", "a.safetensors", "a.md"), ("folder", "b", "b/README.md")):
        monkeypatch.setattr(
            sys, "argv", ["decm", "export", *map(str, (tmp_path / "student", tmp_path / out)), "--to", to]
        )
        assert cli.main() == 0, capsys.readouterr().err
        data = ModelCard.load(tmp_path / card_of).data
        assert (data.license, data.license_name) == ("other", "stabilityai-ai-community")
        assert data.pipeline_tag == "text-to-image"


def test_points_have_no_task_of_the_hub(tmp_path):
    assert card(MLP(2), tmp_path).data.pipeline_tag is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SD, "stabilityai-ai-community"),
        ("/models/stable-diffusion-3.5-large", "stabilityai-ai-community"),
        ("/hub/models--black-forest-labs--FLUX.1-dev/snapshots/abc", "flux-1-dev-non-commercial-license"),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0"),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "nscl-v2-custom"),
        ("/home/susana_x/teacher", "unknown"),
        ("nobody/else", "unknown"),
    ],
)
def test_the_license_of_a_known_base(name, expected):
    found = license_of(Reference(name, ""))
    assert (found.name or found.id) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", License("mit")),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", License("other", "mine")),
        ("---\nlicense: other\nlicense_link: https://a.b/c\n---\n", License("other", None, "https://a.b/c")),
        ("---\nlicense: [mit, gpl]\n---\n", UNKNOWN),
        ("---\nlicense: {\n---\n", UNKNOWN),
        ("---\n- mit\n---\n", UNKNOWN),
        ("# license: mit", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_the_license_in_a_base_s_own_card(text, expected, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert license_of(Reference(str(tmp_path), "")) == expected


def test_the_license_in_the_hub_s_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--nobody--teacher"
    (stored / "snapshots" / "abc").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\n"
    (stored / "snapshots" / "abc" / "README.md").write_text(text)
    link = "https://huggingface.co/nobody/teacher/blob/main/LICENSE.md"
    assert license_of(Reference("nobody/teacher", "")) == License("other", "mine", link)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", UNKNOWN),
        ("Apache-2.0", License("apache-2.0")),
        ("My Own License v2", License("other", "my-own-license-v2")),
    ],
)
def test_a_recorded_license_in_the_terms_of_the_hub(name, expected):
    assert License.named(name) == expected


def test_a_recorded_license_of_a_known_base_has_its_link():
    assert License.named("stabilityai-ai-community").link.endswith("LICENSE.md")


def test_a_record_of_json_gives_the_same_card(network, tmp_path):
    text = card(network, tmp_path).content
    network.record = Record.from_dict(json.loads(json.dumps(RECORD.as_dict())))
    assert card(network, tmp_path).content == text
