"""What tests of whole runs share."""

import pytest

from tests.training.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """A warm process that forks children; it takes seconds to start, so there is one."""
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
