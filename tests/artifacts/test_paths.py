from __future__ import annotations

import pytest

from moec.artifacts.paths import experts_name, is_safe


@pytest.mark.parametrize("path", ["a", "a/b.c", ".hidden", "weights/experts-00000.bin", "..a", "a b"])
def test_paths_inside(path: str) -> None:
    assert is_safe(path)


@pytest.mark.parametrize(
    "path", ["", "/a", "../a", "a/..", "a/./b", ".", "a//b", "a/", "a\\b", "a\n", "a\0", "\x7f"]
)
def test_paths_that_could_lead_elsewhere(path: str) -> None:
    assert not is_safe(path)


def test_names_of_expert_files_sort_by_layer() -> None:
    assert experts_name(7) == "weights/experts-00007.bin"
    assert sorted(map(experts_name, range(200))) == list(map(experts_name, range(200)))
