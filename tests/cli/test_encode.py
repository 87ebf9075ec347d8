"""decm encode from images to a folder that training reads: the latents, a run that is killed, and bad input."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from numpy.random import SeedSequence

from decm_lightning import cli
from decm_lightning.data import ImageNetLatents
from decm_lightning.data.image_files import ImageFiles
from decm_lightning.data.latents import Latents
from decm_lightning.networks import DiT, save
from tests.autoencoders.tiny import save_dc, save_kl, save_tiny
from tests.data.photos import encoded, photos, write_folder, write_tar

ROOT = Path(__file__).parents[2]
QUIET = ["--accelerator", "cpu", "--num_workers", "0"]


def command(out, *argv, images="images", vae="vae", size=16):
    """Return the command that encodes into `out`, in shards of 8 images."""
    return [
        *("encode", "--images", images, "--vae", vae, "--out", out, "--size", str(size)),
        *("--batch_size", "3", "--shard_size", "8", *QUIET, *argv),
    ]


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command where there are 30 images in `images` and a VAE in `vae`: (code, out, err)."""
    write_folder(tmp_path / "images", 30)
    save_kl(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def start(*argv, stderr=subprocess.DEVNULL):
    """Start a command as a program of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "decm_lightning.cli", *argv], env=environment, stdout=subprocess.DEVNULL,
        stderr=stderr,
    )  # fmt: skip


def test_its_help_says_what_each_option_is(decm, capsys):
    with pytest.raises(SystemExit):
        decm("encode", "--help")
    assert "images are cropped to size x size pixels" in capsys.readouterr().out


@pytest.mark.parametrize("posterior", ["sample", "mode"])
@torch.no_grad()
def test_shards_hold_what_the_vae_says_of_both_flips(posterior, decm):
    assert decm(*command("latents", "--posterior", posterior, "--seed", "5"))[0] == 0
    latents = Latents("latents", 2)
    files = ImageFiles("images")
    vae = diffusers.AutoencoderKL.from_pretrained("vae").eval()
    assert [len(part) for part in (latents.shards.files, latents, files)] == [4, 30, 30]
    assert latents.shards.labels.tolist() == [0] * 15 + [1] * 15
    for number in (0, 7, 8, 29):
        image = files.read(number, 16)[None] / 127.5 - 1
        noise = torch.Generator().manual_seed(int(SeedSequence((5, number)).generate_state(1)[0]))
        found = latents.shards.read([number, 30 + number])
        for row, pixels in enumerate((image, image.flip(-1))):
            encoded = vae.encode(pixels).latent_dist
            drawn = torch.randn(encoded.mean.shape[1:], generator=noise)
            expected = encoded.mean + (encoded.std * drawn if posterior == "sample" else 0)
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=0)
    assert latents.provenance.vae.startswith("AutoencoderKL ")
    std, mean = torch.std_mean(latents.shards.read(range(60)), (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(latents.scaling.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.scaling.std, std, atol=1e-5, rtol=0)


def test_every_tool_reads_what_it_writes(decm):
    assert decm(*command("latents"))[0] == 0
    code, out, _ = decm("validate-data", "latents", "--channels", "2", "--size", "8")
    assert code == 0
    assert "30, each plain and mirrored" in out
    data = ImageNetLatents("latents", 4, 0, 2, vae="vae", reference_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.decode(batch.x_1).shape == (4, 3, 16, 16)


def test_whoever_may_read_the_folder_may_read_the_shards(decm):
    """The safetensors library would let the owner alone."""
    assert decm(*command("latents"))[0] == 0
    Path("new").touch()
    modes = {file.stat().st_mode for file in Path("latents").glob("*.*")}
    assert modes == {Path("new").stat().st_mode}


@pytest.mark.parametrize("write", [save_dc, save_tiny])
def test_other_vaes_encode_as_well(write, decm):
    write(Path("other"))
    assert decm(*command("latents", vae="other"))[0] == 0
    assert Latents("latents", 2).shards.shape[0] in (3, 4)


def test_tars_are_encoded(decm):
    for part in range(2):
        members = {}
        for number, (image, label) in enumerate(photos(5, seed=part)):
            members |= {f"{number}.jpg": encoded(image, "jpg"), f"{number}.cls": str(label + part).encode()}
        write_tar(Path(f"{part}.tar"), members)
    assert decm(*command("latents", images="*.tar"))[0] == 0
    assert Latents("latents", 3).shards.labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 1, 2, 1]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(decm, tmp_path):
    write_folder(tmp_path / "more", 240)
    assert decm(*command("whole", images="more"))[0] == 0
    run = start(*command("latents", images="more"))
    written = []
    while len(written) < 2 and run.poll() is None:
        time.sleep(0.01)
        written = list(Path("latents").glob("*.safetensors"))
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in Path("latents").glob("*.safetensors")}
    assert 2 <= len(done) < 30
    assert decm(*command("latents", images="more"))[0] == 0
    assert contents("latents") == contents("whole")
    assert {file: file.stat().st_mtime_ns for file in done} == done


def test_a_finished_folder_is_left_as_it_is(decm):
    assert decm(*command("latents"))[0] == 0
    before = contents("latents")
    shards = {file: file.stat().st_mtime_ns for file in Path("latents").glob("*.safetensors")}
    assert decm(*command("latents"))[0] == 0
    assert contents("latents") == before
    assert {file: file.stat().st_mtime_ns for file in shards} == shards


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["8", "100"])
def test_two_processes_write_what_one_does(shard_size, decm):
    # With shards of 100 images there is one, and the second process has nothing to do.
    assert decm(*command("one", "--shard_size", shard_size))[0] == 0
    assert start(*command("two", "--shard_size", shard_size, "--devices", "2")).wait() == 0
    assert contents("two") == contents("one")


def spoil_an_image():
    Path("images/flower/0003.png").write_bytes(Path("images/flower/0003.png").read_bytes()[:100])


def test_a_broken_image_is_named_and_finished_shards_are_kept(decm):
    whole = Path("images/flower/0003.png").read_bytes()
    spoil_an_image()
    for workers in ("0", "2"):
        refused(decm, command("latents", "--num_workers", workers), "flower/0003.png is no whole image: ")
    assert len(list(Path("latents").glob("*.safetensors"))) == 2
    Path("images/flower/0003.png").write_bytes(whole)
    assert decm(*command("latents"))[0] == 0
    assert decm(*command("again"))[0] == 0
    assert contents("latents") == contents("again")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["china/0004.png", "flower/0003.png"])
def test_a_broken_image_of_one_of_two_processes_is_named(name, decm):
    """The other process, which has no reason of its own to stop, gives one line too."""
    Path("images", name).write_bytes(b"broken")
    run = start(*command("latents", "--devices", "2"), stderr=subprocess.PIPE)
    _, err = run.communicate(timeout=200)
    lines = [line for line in err.decode().splitlines() if line.startswith("decm: error: ")]
    assert run.returncode == 2
    assert "Traceback" not in err.decode()
    assert any(line.startswith(f"decm: error: {name} is no whole image: ") for line in lines)


def grey_vae():
    diffusers.AutoencoderTiny(1, 1, (8,), (8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)).save_pretrained(
        "grey"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (command("latents", images="gone"), "no folder or file gone: give a folder of class folders, or tars"),
        (command("latents", images="vae"), "no image in vae"),
        (command("latents", vae="gone.pt"), "no file gone.pt: give a VAE's file"),
        (command("latents", vae="grey"), "the VAE must be for RGB images: grey has 1 channels"),
        (command("latents", size=17), "size must be a multiple of the VAE's 2 pixels a latent: got 17"),
        (command("latents", size=0), "size must be a multiple of the VAE's 2 pixels a latent: got 0"),
        (command("latents", "--batch_size", "0"), "batch_size must be at least 1: got 0"),
        (command("latents", "--shard_size", "0"), "shard_size must be at least 1: got 0"),
        (command("latents", "--num_classes", "3"), "images has 2 class folders: num_classes is 3"),
        (command("latents", "--posterior", "median"), "posterior: Expected a typing.Literal"),
        (["encode", "--vae", "vae", "--out", "latents"], "images"),
        (command("begun", size=18), "begun was begun with size 16: got 18; give the same, or another --out"),
        (command("begun", vae="other"), "begun was begun with vae AutoencoderKL"),
        (command("begun", images="fewer"), "begun was begun with images_sha256"),
    ],
)
def test_bad_input_gives_one_clear_line_and_exit_code_2(argv, message, decm):
    grey_vae()
    save_kl(Path("other"), seed=1)
    write_folder(Path("fewer"), 4)
    if "begun" in argv:
        assert decm(*command("begun"))[0] == 0
    refused(decm, argv, message)


def test_a_latent_student_gives_pictures(decm):
    assert decm(*command("latents"))[0] == 0
    torch.manual_seed(0)
    save(DiT(8, 2, patch_size=2, width=16, depth=1, heads=2, num_classes=2), Path("student"))
    refused(decm, ["sample", "student"], "the model makes 2 channels, latents: give --vae and --latents")
    refused(decm, ["sample", "student", "--vae", "vae"], "give --vae and --latents together")
    argv = ["--per_class", "2", "--out", "drawn", "--latents", "latents"]
    assert decm("sample", "student", *argv, "--vae", "vae")[0] == 0
    assert len(list(Path("drawn").iterdir())) == 4
    save_kl(Path("other"), seed=1)
    refused(decm, ["sample", "student", *argv, "--vae", "other"], "encoded these latents: other is AutoencoderKL")
    save(DiT(8, 3, patch_size=2, width=16, depth=1, heads=2, num_classes=2), Path("other_student"))
    refused(
        decm, ["sample", "other_student", *argv, "--vae", "vae"], "the model makes 3 channels: latents of vae have 2"
    )


def test_what_is_drawn_is_decoded(decm):
    from PIL import Image

    from decm_lightning.samplers import mix

    assert decm(*command("latents"))[0] == 0
    torch.manual_seed(0)
    network = DiT(8, 2, patch_size=2, width=16, depth=1, heads=2, num_classes=2).eval()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    save(network, Path("student"))
    argv = ["--classes", "[1]", "--per_class", "1", "--scale", "1", "--out", "one.png", "--seed", "3"]
    assert decm("sample", "student", *argv, "--vae", "vae", "--latents", "latents")[0] == 0
    x_0 = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    scaling = torch.load("latents/latents_stats.pt", weights_only=True)
    with torch.no_grad():
        drawn = mix(network, x_0, torch.tensor([1]), steps=1) * scaling["std"] + scaling["mean"]
        image = diffusers.AutoencoderKL.from_pretrained("vae").eval().decode(drawn).sample[0]
    expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    found = torch.tensor(Image.open("one.png").getdata()).view(16, 16, 3)
    assert (found - expected).abs().max() <= 0.51


def test_the_record_says_how_it_was_encoded(decm):
    assert decm(*command("latents"))[0] == 0
    content = json.loads(Path("latents/cache.json").read_text())
    assert content["encoding"] == json.loads(Path("latents/manifest/request.json").read_text())
    assert content["encoding"]["size"] == 16


def refused(decm, argv, message):
    """Check that a command ends with one line that has the message."""
    code, _, err = decm(*argv)
    lines = [line for line in err.splitlines() if line.startswith("decm: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
