from __future__ import annotations

from pathlib import Path

import pytest

from moec.artifacts.files.safetensors import read_table
from moec.errors import BundleError


def test_a_header_that_nests_without_end_is_an_error(tmp_path: Path) -> None:
    header = b"[" * 200_000
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match="header cannot be read"):
        read_table(path)
