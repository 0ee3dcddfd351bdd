"""A model that is served, for all tests of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.asking import SCRIPT, connected
from tests.support.served import make_model, served

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from moec.runtime.model import Model
    from moec.runtime.serving.server import Server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), SCRIPT)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same, not served: an engine has one driver."""
    return make_model(tmp_path_factory.mktemp("twin"), SCRIPT)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[tuple[str, Server]]:
    with served(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Server]) -> Iterator[httpx.Client]:
    with connected(server[0]) as client:
        yield client
