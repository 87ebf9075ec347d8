"""Look-ups on the Hugging Face hub: without a network they fail in seconds, and use what is cached."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from decm_lightning.networks.hub import cache_without_network


@pytest.fixture
def closed(monkeypatch) -> str:
    """The address of a hub where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return address


def test_without_a_network_a_model_of_transformers_is_refused_at_once(closed):
    transformers = pytest.importorskip("transformers")
    began = time.perf_counter()
    with cache_without_network("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(OSError, match=closed):
            transformers.AutoConfig.from_pretrained("nobody/nothing")
    # A later upload finds the network again.
    assert not constants.HF_HUB_OFFLINE
    # Five repetitions would take 23 seconds or more.
    assert time.perf_counter() - began < 10


def test_a_hub_that_answers_is_used_and_a_folder_needs_none(closed, tmp_path, monkeypatch):
    with cache_without_network(tmp_path):
        assert not constants.HF_HUB_OFFLINE
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with cache_without_network("nobody/nothing"):
            assert not constants.HF_HUB_OFFLINE
        thread.join()


def test_without_a_network_a_pipeline_is_refused_at_once_or_read_from_the_cache(closed, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from decm_lightning.teachers import DiffusersPrompts
    from tests.teachers.pipelines import pixart

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--cached" / "snapshots" / ("0" * 40)
    pixart().save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(FileNotFoundError, match="pipeline nobody/nothing not found"):
        _ = DiffusersPrompts("nobody/nothing").max_tokens
    cached = DiffusersPrompts("somebody/cached", max_tokens=3)
    assert cached.lengths(["a"]) == [len(cached._tokenizer("a")["input_ids"])]
    assert cached(["a"]).tokens.shape[:2] == (1, 3)
    # Repetitions of one request take 23 seconds.
    assert not slept
