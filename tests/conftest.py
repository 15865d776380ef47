"""Settings of the whole suite."""

import os

import pytest

# Several test processes share the machine: one thread each beats all of them competing for all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may download


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """A warm process that forks children; it takes seconds to start, so there is one."""
    from tests.training.nursery import Nursery

    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
