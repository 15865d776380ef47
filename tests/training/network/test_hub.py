"""A hub that does not answer is asked once."""

import socket

import pytest
from huggingface_hub import constants

from bnfinetune.recipe import Model
from bnfinetune.source_paths import _PROXIES
from bnfinetune.training.network.hub import cache_if_unreachable


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "name", ["resnet18", "hf-hub:somebody/network", "bnf_resnet", "local-dir:network", "?:?", "resnet18.x"]
)
def test_only_the_cache_is_asked_where_the_hub_does_not_answer(there, name, monkeypatch):
    asked = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kw: asked.append(args) or connect(*args, **kw))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for proxy in _PROXIES:
        monkeypatch.delenv(proxy, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # a port that refuses connections until somebody listens
        if there:
            server.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with cache_if_unreachable(Model(name=name)):
            offline = constants.is_offline_mode()
    of_hub = name in ("resnet18", "hf-hub:somebody/network")
    assert len(asked) == of_hub
    assert offline == (of_hub and not there)
    assert not constants.is_offline_mode()
