"""decm encode from images to a folder that training reads: the latents, a run that is killed, and bad input."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from decm_lightning import cli
from decm_lightning.data import ImageNetLatents
from decm_lightning.data.images.image_files import ImageFiles
from decm_lightning.data.latents.imagenet import Latents
from decm_lightning.networks import DiT, save
from decm_lightning.seeds import generator_of
from tests.autoencoders.tiny import save_dc, save_kl, save_tiny
from tests.data.photos import encoded, noise_generator, photos, write_folder, write_tar

ROOT = Path(__file__).parents[2]
PAUSED = """
import threading
from decm_lightning.__main__ import main
from decm_lightning.data.latents.encoding import Encoding
write = Encoding._write
def write_and_wait(self, number):
    write(self, number)
    print("written", flush=True)
    threading.Event().wait()
Encoding._write = write_and_wait
main()
"""
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
    """Start a command as a separate program."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.Popen(
        [sys.executable, "-m", "decm_lightning", *argv], env=environment, stdout=subprocess.DEVNULL,
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
        noise = noise_generator(5, files.files[number].name)
        found = latents.shards.read([number, 30 + number])
        for row, pixels in enumerate((image, image.flip(-1))):
            encoded = vae.encode(pixels).latent_dist
            noise_of_image = torch.randn(encoded.mean.shape[1:], generator=noise)
            expected = encoded.mean + (encoded.std * noise_of_image if posterior == "sample" else 0)
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=0)
    assert latents.provenance.vae.startswith("AutoencoderKL ")
    std, mean = torch.std_mean(latents.shards.read(range(60)), (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(latents.normalization.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.normalization.std, std, atol=1e-5, rtol=0)


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
    """The safetensors library would give access only to the owner."""
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


def shards(folder="latents"):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(folder).glob("*.safetensors")}


def test_broken_headers_are_found_before_the_folder_is_begun(decm):
    for number in (5, 7, 9, 11):
        Path(f"images/flower/{number:04d}.png").write_bytes(b"broken")
    named = "4 broken images: flower/0005.png cannot be read as an image (cannot identify image file); flower/0007.png"
    refused(decm, command("latents"), named)
    refused(decm, command("latents"), "; and 1 more: replace or delete them, or leave them out with --on_error skip")
    assert not list(Path("latents").glob("*.*"))
    assert not Path("latents/manifest/request.json").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_pixels_are_named_and_finished_shards_are_kept(workers, decm):
    image = Path("images/flower/0003.png")
    whole, stat = image.read_bytes(), image.stat()
    image.write_bytes(whole[:300])
    refused(decm, command("latents", "--num_workers", workers), "1 broken image: flower/0003.png cannot be read as an")
    before = shards()
    assert len(before) == 2
    image.write_bytes(whole)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, out, _ = decm(*command("latents"))
    assert code == 0
    assert "2 of 4 shards are up to date" in out
    assert shards().items() >= before.items()
    assert decm(*command("again"))[0] == 0
    assert contents("latents") == contents("again")


def test_skip_leaves_out_broken_images_and_keeps_the_others_as_they_were(decm):
    assert decm(*command("whole"))[0] == 0
    Path("images/china/0002.png").write_bytes(Path("images/china/0002.png").read_bytes()[:300])
    Path("images/flower/0005.png").write_bytes(b"broken")
    code, out, _ = decm(*command("latents", "--on_error", "skip"))
    assert code == 0
    assert "wrote 4 shards of 28 images" in out
    assert "left out 2 broken images: china/0002.png cannot be read as an image (" in out
    assert "flower/0005.png cannot" in out
    left, whole = (Latents(folder, 2).shards for folder in ("latents", "whole"))
    kept = [number for number in range(30) if number not in (1, 17)]
    assert left.labels.tolist() == whole.labels[kept].tolist()
    torch.testing.assert_close(left.read(range(28)), whole.read(kept), atol=1e-4, rtol=0)
    before = shards()
    code, out, _ = decm(*command("latents", "--on_error", "skip"))
    assert "all 4 shards of 28 images in latents were up to date" in out
    assert "left out 2 broken images: china/0002.png" in out
    assert shards() == before
    refused(decm, command("latents"), "1 broken image: flower/0005.png")


def test_a_shard_without_an_image_has_no_file(decm):
    for number in range(16, 30):
        for image in Path("images").glob(f"*/{number:04d}.png"):
            image.write_bytes(b"broken")
    code, out, _ = decm(*command("latents", "--on_error", "skip", "--batch_size", "8", "--shard_size", "2"))
    assert code == 0
    assert "of 16 images" in out
    assert len(Latents("latents", 2)) == 16
    assert len(shards()) == 9
    assert decm(*command("latents", "--on_error", "skip", "--shard_size", "2"))[1].startswith("all 15 shards of 16")
    for image in Path("images").glob("*/*.png"):
        image.write_bytes(b"broken")
    refused(decm, command("none", "--on_error", "skip"), "none of the 30 images can be read")


def test_a_replaced_image_is_encoded_again(decm):
    assert decm(*command("latents"))[0] == 0
    before = shards()
    Image.new("RGB", (20, 20), "red").save("images/flower/0003.png")
    code, out, _ = decm(*command("latents"))
    assert code == 0
    assert "wrote 1 shards (3 were up to date) of 30 images" in out
    assert [name for name, content in shards().items() if content != before[name]] == [
        "latents_rank00_shard002.safetensors"
    ]
    assert decm(*command("again"))[0] == 0
    assert contents("latents") == contents("again")
    code, out, _ = decm(*command("latents"))
    assert out.startswith("all 4 shards of 30 images in latents were up to date")
    assert "wrote" not in out


def test_a_removed_or_new_image_changes_its_own_shard_only(decm):
    assert decm(*command("latents"))[0] == 0
    before, whole = shards(), Latents("latents", 2).shards
    latents = whole.read(range(30))
    Path("images/china/0002.png").unlink()
    assert "wrote 1 shards (3 were up to date) of 29 images" in decm(*command("latents"))[1]
    assert len(before.items() - shards().items()) == 1
    found = Latents("latents", 2)
    rows = [number for number in range(30) if number != 1]
    torch.testing.assert_close(found.shards.read(range(29)), latents[rows], atol=1e-4, rtol=0)
    Image.new("RGB", (20, 20), "red").save("images/flower/new.png")
    assert "wrote 1 shards (3 were up to date) of 30 images" in decm(*command("latents"))[1]
    assert len(before.items() - shards().items()) == 2


def test_files_of_a_shard_without_images_are_removed(decm):
    assert decm(*command("latents"))[0] == 0
    for image in Path("images/flower").glob("*.png"):
        if int(image.stem) > 3:
            image.unlink()
    Path("latents/latents_rank00_shard009.safetensors.partial").touch()
    assert "of 17 images" in decm(*command("latents"))[1]
    assert sorted(shards()) == [f"latents_rank00_shard00{number}.safetensors" for number in range(3)]
    assert len(list(Path("latents/manifest").glob("*.safetensors.json"))) == 3
    assert not list(Path("latents").glob("*.partial"))
    assert len(Latents("latents", 2)) == 17


def test_a_stray_hidden_file_is_counted_and_left_out(decm):
    Path("images/china/._0.png").write_bytes(b"Mac OS X")
    Path("images/notes.txt").touch()
    code, out, _ = decm(*command("latents"))
    assert code == 0
    assert "left out of images: " in out
    assert "hidden (1)" in out
    assert ".txt (1)" in out
    Path("images/china/._0.png").unlink()
    assert "all 4 shards of 30 images" in decm(*command("latents"))[1]


def test_a_file_name_that_is_not_utf_8_is_encoded(decm):
    os.rename(b"images/china/0002.png", b"images/china/na\xefve.png")
    assert "of 30 images" in decm(*command("latents"))[1]
    with open(b"images/china/na\xefve.png", "wb") as file:
        file.write(b"broken")
    refused(decm, command("latents"), r"china/na\xefve.png cannot be read as an image (cannot identify image file)")


def test_damaged_files_of_a_folder_are_encoded_again_or_named(decm):
    assert decm(*command("latents"))[0] == 0
    whole = contents("latents")
    shard = Path("latents/latents_rank00_shard001.safetensors")
    record = Path("latents/manifest/latents_rank00_shard002.safetensors.json")
    for damage in (b"", b"{}", b"[]", b"\xff\xfe", record.read_bytes()[:-20], record.read_bytes().replace(b"[", b"{")):
        shard.write_bytes(shard.read_bytes()[:-1])
        record.write_bytes(damage)
        assert "wrote 2 shards (2 were up to date)" in decm(*command("latents"))[1]
        assert contents("latents") == whole
    request = Path("latents/manifest/request.json")
    for damage in (b"", b"{}", b"[]", b"null", b"\xff\xfe"):
        request.write_bytes(damage)
        refused(decm, command("latents"), "manifest/request.json is damaged: delete latents, or choose another --out")


def test_a_folder_in_use_is_refused(decm):
    """Two processes would write the same shards."""
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); sys.stdin.read()"
    Path("latents/manifest").mkdir(parents=True)
    lock = [sys.executable, "-u", "-c", hold, "latents/manifest/encode.lock"]
    with subprocess.Popen(lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        refused(decm, command("latents"), "another process is encoding into latents")
        other.kill()
    assert decm(*command("latents"))[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(decm):
    Path("latents").mkdir(mode=0o500)
    refused(decm, command("latents"), "latents/manifest: Permission denied")


def test_a_full_disk_is_named_by_its_path(decm, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr("decm_lightning.data.latents.manifest.save_file", full)
    refused(decm, command("latents"), "latents/latents_rank00_shard000.safetensors: No space left on device")


def full(tensors, file):
    raise SafetensorError("Error while serializing: I/O error")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_it_in_one_line(signum, line, decm):
    """While its workers read images. It waits after the first shard, so that it cannot finish first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *command("latents", "--num_workers", "2")], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert run.stdout.readline() == "written\n"
    run.send_signal(signum)
    assert run.communicate(timeout=300) == ("", f"decm: {line}\n")
    assert run.returncode == 128 + signum
    assert len(list(Path("latents").glob("*.safetensors"))) == 1
    assert not list(Path("latents").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["china/0004.png", "flower/0003.png"])
@pytest.mark.parametrize("length", [6, 300])
def test_a_broken_image_of_one_of_two_processes_is_named(name, length, decm):
    """The other process, which did not fail itself, also prints one line."""
    Path("images", name).write_bytes(Path("images", name).read_bytes()[:length])
    run = start(*command("latents", "--devices", "2"), stderr=subprocess.PIPE)
    _, err = run.communicate(timeout=200)
    lines = [line for line in err.decode().splitlines() if line.startswith("decm: error: ")]
    assert run.returncode == 2
    assert "Traceback" not in err.decode()
    assert any(line.startswith(f"decm: error: 1 broken image: {name} cannot be read as an image (") for line in lines)


def grey_vae():
    diffusers.AutoencoderTiny(1, 1, (8,), (8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)).save_pretrained(
        "grey"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (command("latents", images="gone"), "no folder or file at gone"),
        (command("latents", images="vae"), "no image in vae"),
        (command("latents", vae="gone.pt"), "no file gone.pt"),
        (command("latents", vae="grey"), "3 channels: grey has 1"),
        (command("latents", size=17), "size must be a multiple of 2, the VAE's downsampling: got 17"),
        (command("latents", size=0), "size must be a multiple of 2, the VAE's downsampling: got 0"),
        (command("latents", "--batch_size", "0"), "batch_size must be at least 1: got 0"),
        (command("latents", "--shard_size", "0"), "shard_size must be at least 1: got 0"),
        (command("latents", "--num_classes", "3"), "images has 2 class folders: num_classes is 3"),
        (command("latents", "--num_classes", "0"), "num_classes must be at least 1: got 0"),
        (command("images"), "images is inside the image folder images"),
        (command("images/latents"), "images/latents is inside the image folder images"),
        (command("latents", "--posterior", "median"), "posterior: expected one of "),
        (["encode", "--vae", "vae", "--out", "latents"], "images"),
        (command("begun", size=18), "begun was started with size 16, but now size is 18"),
        (command("begun", vae="other"), "begun was started with vae AutoencoderKL"),
        (command("begun", "--seed", "1"), "begun was started with seed 0, but now seed is 1"),
        (command("begun", "--shard_size", "9"), "begun was started with shard_size 8, but now shard_size is 9"),
        (command("latents", "--seed", "-1"), "seed must be from 0 to 2**63 - 1: got -1"),
        (command("latents", "--seed", str(1 << 63)), "seed must be from 0 to 2**63 - 1: got 9223372036854775808"),
        (command("latents", "--on_error", "ignore"), "on_error: expected one of "),
    ],
)
def test_bad_input_gives_one_clear_line_and_exit_code_2(argv, message, decm):
    grey_vae()
    save_kl(Path("other"), seed=1)
    write_folder(Path("fewer"), 4)
    if "begun" in argv:
        assert decm(*command("begun"))[0] == 0
    refused(decm, argv, message)


def test_a_latent_student_generates_images(decm):
    assert decm(*command("latents"))[0] == 0
    torch.manual_seed(0)
    save(DiT(8, 2, patch_size=2, width=16, depth=1, heads=2, num_classes=2), Path("student"))
    refused(decm, ["sample", "student"], "the model generates latents with 2 channels: give --vae and --latents")
    refused(decm, ["sample", "student", "--vae", "vae"], "give --vae and --latents together")
    argv = ["--per_class", "2", "--out", "images_of_student", "--latents", "latents"]
    assert decm("sample", "student", *argv, "--vae", "vae")[0] == 0
    assert len(list(Path("images_of_student").glob("*.png"))) == 4
    save_kl(Path("other"), seed=1)
    refused(decm, ["sample", "student", *argv, "--vae", "other"], "encoded these latents, but other is AutoencoderKL")
    save(DiT(8, 3, patch_size=2, width=16, depth=1, heads=2, num_classes=2), Path("other_student"))
    refused(
        decm,
        ["sample", "other_student", *argv, "--vae", "vae"],
        "the model generates 3 channels, but latents of vae have 2",
    )


def test_generated_latents_are_decoded(decm):
    from decm_lightning.samplers import mix

    assert decm(*command("latents"))[0] == 0
    torch.manual_seed(0)
    network = DiT(8, 2, patch_size=2, width=16, depth=1, heads=2, num_classes=2, end_time=True).eval()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    save(network, Path("student"))
    argv = ["--classes", "[1]", "--per_class", "1", "--scale", "1", "--out", "one.png", "--seed", "3", "--steps", "1"]
    assert decm("sample", "student", *argv, "--vae", "vae", "--latents", "latents")[0] == 0
    x_0 = torch.randn(1, 2, 8, 8, generator=generator_of(3, 1))
    scaling = torch.load("latents/latents_stats.pt", weights_only=True)
    with torch.no_grad():
        sampled = mix(network, x_0, torch.tensor([1]), steps=1) * scaling["std"] + scaling["mean"]
        image = diffusers.AutoencoderKL.from_pretrained("vae").eval().decode(sampled).sample[0]
    expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    found = torch.tensor(Image.open("one.png").getdata()).view(16, 16, 3)
    assert (found - expected).abs().max() <= 0.51


def test_the_record_says_how_it_was_encoded(decm):
    assert decm(*command("latents"))[0] == 0
    content = json.loads(Path("latents/cache.json").read_text())
    request = json.loads(Path("latents/manifest/request.json").read_text())
    assert content["encoding"].items() >= {name: request[name] for name in request if name != "shard_starts"}.items()
    assert content["encoding"]["size"] == 16
    assert len(content["encoding"]["images_sha256"]) == 64


def refused(decm, argv, message):
    """Check that a command ends with a one-line error that contains the message."""
    code, _, err = decm(*argv)
    lines = [line for line in err.splitlines() if line.startswith("decm: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
