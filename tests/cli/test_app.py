"""decm app: the images of decm sample, errors in one line, and the page in a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from decm_lightning import cli
from decm_lightning.cli.app import COUNTS, IMAGES, RECOMMENDED, Studio, check_port
from decm_lightning.cli.sampling import image_generator
from decm_lightning.errors import NonFiniteError
from decm_lightning.networks import MLP, DiT, TextDiT, load, save
from decm_lightning.networks.record import Record

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (extra app)")
WAIT = 120
"""Seconds, for a busy machine."""


def digits() -> DiT:
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command in a folder with a tiny student: (exit code, out, err)."""
    save(digits(), tmp_path / "student")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def studio(model: str, folder: Path) -> Studio:
    network = load(model)
    encoder = network.caption_encoder() if isinstance(network, TextDiT) else None
    return Studio(image_generator(network, None, None, 0, None, None), encoder, folder)


@pytest.mark.parametrize(("sampler", "steps"), [(RECOMMENDED, 2), ("consistency", 5), ("euler", 50)])
def test_the_images_of_a_class_are_those_of_decm_sample(sampler, steps, decm, tmp_path):
    column = studio("student", tmp_path).column(3, sampler, steps, 7)
    named = [] if sampler == RECOMMENDED else ["--sampler", sampler]
    options = ["--classes", "[3]", "--per_class", str(IMAGES), "--steps", str(steps), "--seed", "7", *named]
    assert decm("sample", "student", "--out", "images", *options)[0] == 0
    expected = {file.name: file.read_bytes() for file in Path("images").glob("*.png")}
    assert {file.name: file.read_bytes() for file in column.files} == expected
    assert len(set(expected.values())) == IMAGES
    assert column.milliseconds > 0


def test_the_images_of_a_caption_are_those_of_decm_sample_prompts(decm, tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    Path("encoder").mkdir()
    Path("encoder/vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab="encoder/vocab.txt").save_pretrained("encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained("encoder")
    save(TextDiT(8, 3, 8, patch_size=2, width=16, depth=1, heads=2, end_time=True, text_encoder="encoder"), "text")
    page = studio("text", tmp_path)
    column = page.column(" a red cow ", "mix", 4, 1)
    Path("prompts.txt").write_text("a red cow\n")
    options = ["--per_prompt", str(IMAGES), "--steps", "4", "--seed", "1", "--sampler", "mix"]
    assert decm("sample-prompts", "text", "--prompts", "prompts.txt", "--out", "images", *options)[0] == 0
    expected = [file.read_bytes() for file in sorted(Path("images/00000/samples").glob("*.png"))]
    assert [file.read_bytes() for file in column.files] == expected
    with pytest.raises(ValueError, match="caption is empty"):
        page.column("  ", "mix", 4, 1)


def test_the_recommended_sampler_depends_on_the_number_of_steps(decm, tmp_path):
    page = studio("student", tmp_path)
    page.generator.network.record = Record(sampling={4: "consistency", 2: "mix"})
    for steps, sampler in ((4, "consistency"), (2, "mix")):
        found, expected = (page.column(3, name, steps, 0).files[0].read_bytes() for name in (RECOMMENDED, sampler))
        assert found == expected


def test_an_address_is_never_used_twice(decm, tmp_path):
    """A browser would show the stored image instead."""
    page = studio("student", tmp_path)
    assert page.column(3, "mix", 2, 0).files[0] != page.column(3, "mix", 2, 1).files[0]


def test_settings_out_of_range_and_diverged_weights_are_refused(decm, tmp_path):
    page = studio("student", tmp_path)
    for seed, steps, message in ((-1, 2, "seed"), (0, 0, "steps")):
        with pytest.raises(ValueError, match=message):
            page.column(3, "mix", steps, seed)
    torch.nn.init.constant_(page.generator.network.final_layer.linear.bias, float("nan"))
    with pytest.raises(NonFiniteError):
        page.column(3, "mix", 2, 0)


def test_an_occupied_port_and_a_wrong_one_are_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*in use.*--port"):
            check_port(port)
    check_port(port)
    for wrong in (0, -1, 65536):
        with pytest.raises(ValueError, match=f"from 1 to 65535: got {wrong}"):
            check_port(wrong)


def test_a_missing_gradio_is_one_line_that_names_the_extra(decm, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = decm("app", "student")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "extra 'app'" in line


@needs_gradio
@pytest.mark.parametrize(
    ("model", "argv", "message"),
    [
        ("nowhere", [], "no checkpoint or folder at nowhere"),
        ("note.txt", [], "note.txt cannot be read"),
        ("points", [], "samples must be images"),
        ("diverged", [], "images are not finite"),
        ("student", ["--device", "nowhere"], "device 'nowhere' is not available"),
        ("student", ["--port", "{occupied}"], "port {occupied} cannot be used"),
        ("student", ["--port", "0"], "port must be from 1 to 65535: got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, argv, message, decm):
    Path("note.txt").write_text("not a model")
    save(MLP(2), "points")
    network = digits()
    torch.nn.init.constant_(network.final_layer.linear.bias, float("nan"))
    save(network, "diverged")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        occupied = str(other.getsockname()[1])
        code, _, err = decm("app", model, *(part.format(occupied=occupied) for part in argv))
    assert code == 2
    (line,) = err.strip().splitlines()
    assert message.format(occupied=occupied) in line


@pytest.fixture
def server(decm, tmp_path):
    """A running `decm app` of the student: (address, process)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "decm_lightning", "app", "student", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env=os.environ
        | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        # A shell may start the tests with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    yield f"http://127.0.0.1:{port}", process
    process.kill()
    process.wait()


@pytest.fixture
def browser():
    """A headless browser."""
    if CHROME is None or shutil.which("chromedriver") is None or find_spec("selenium") is None:
        pytest.skip("needs selenium, and chromium with chromedriver (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def resize(browser, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(condition):
    """Wait for a condition and return its value."""
    end = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < end, "the page does not change"
        time.sleep(0.1)
    return found


@needs_gradio
def test_a_visitor_generates_images_and_ctrl_c_ends_the_server(browser, server, decm):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    address, process = server
    resize(browser, 1280, 720)
    browser.get(address)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#generate"))
    field = browser.find_element(By.CSS_SELECTOR, "#condition input")
    field.click()
    field.send_keys(Keys.CONTROL + "a")
    field.send_keys("7", Keys.ENTER)
    seed = browser.find_element(By.CSS_SELECTOR, "#seed input")
    seed.send_keys(Keys.CONTROL + "a")
    seed.send_keys("5", Keys.TAB)
    browser.find_element(By.ID, "generate").click()
    count = IMAGES * (len(COUNTS) + 1)
    images = until(lambda: len(found := browser.find_elements(By.CSS_SELECTOR, "#samples img")) == count and found)
    assert all(until(lambda image=image: int(image.get_property("naturalWidth"))) == 8 for image in images)

    assert field.get_property("value") == "7"
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#samples figcaption")]
    assert [head.split()[0] for head in heads] == ["1", "2", "4", "8", "16"]
    assert all(float(head.split()[-2]) >= 0 and head.endswith(" ms") for head in heads)
    for place, steps in enumerate((*COUNTS, 16)):
        options = ["--classes", "[7]", "--per_class", str(IMAGES), "--steps", str(steps), "--seed", "5"]
        assert decm("sample", "student", "--out", f"steps{steps}", *options)[0] == 0
        expected = [file.read_bytes() for file in sorted(Path(f"steps{steps}").glob("*.png"))]
        shown = images[IMAGES * place : IMAGES * (place + 1)]
        assert [urllib.request.urlopen(image.get_attribute("src")).read() for image in shown] == expected

    foreign = "return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)"
    assert set(browser.execute_script(foreign)) == {address}
    for width in (1280, 390):
        resize(browser, width, 800)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(list(Path().glob("decm-app-*"))) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 128 + signal.SIGINT
    assert not list(Path().glob("decm-app-*"))
