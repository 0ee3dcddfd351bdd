"""Files of experts that are read while a model is loaded, or runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.artifacts.files.reader import open_bundle
from moec.artifacts.paths import experts_name
from moec.errors import BundleError
from moec.runtime.devices.cuda.offload.host_tier import opened, read_expert
from tests.support.tiny_bundle import make_bundle


def test_an_expert_is_read_and_a_file_that_is_gone_or_short_is_named(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny.moec"))
    layer = bundle.model.experts[0].layer
    name, expected = experts_name(layer), np.array(bundle.expert_view(layer, 1))
    target = np.empty(expected.size, np.uint8)
    with opened(bundle, name) as file:
        read_expert(file, target, expected.size, bundle, name)
        np.testing.assert_array_equal(target, expected)
        with pytest.raises(BundleError, match=r"experts-00000\.bin ends after"):
            read_expert(file, target, (bundle.path / name).stat().st_size - 1, bundle, name)
    (bundle.path / name).unlink()
    with (
        pytest.raises(BundleError, match=r"experts-00000\.bin cannot be read: No such file"),
        opened(bundle, name),
    ):
        pass
