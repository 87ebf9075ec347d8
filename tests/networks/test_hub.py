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
