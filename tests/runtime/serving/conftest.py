"""A model that is served, for all tests of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.asking import SCRIPT
from tests.support.served import make_model, served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.runtime.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), SCRIPT)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same, not served: an engine has one driver."""
    return make_model(tmp_path_factory.mktemp("twin"), SCRIPT)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[httpx.Client]:
    with served(model) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        yield client
