from __future__ import annotations

import dataclasses

import pytest

from moec.artifacts.layout.experts import EXPERT_ALIGNMENT, PART_ALIGNMENT, layout
from moec.artifacts.model import DType, ExpertBody
from moec.formats import FORMATS, row_bytes

BODY = ExpertBody("e", 20, 9, True, True, True, ("mul", ("silu", "gate"), "up"), "bfloat16")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("up_bias", [True, False])
@pytest.mark.parametrize("down_bias", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parts_follow_each_other_aligned_and_apart(
    gated: bool, up_bias: bool, down_bias: bool, dtype: DType
) -> None:
    body = dataclasses.replace(BODY, gated=gated, up_bias=up_bias, down_bias=down_bias, dtype=dtype)
    found = layout(body)
    expected = ["gate"] * gated + ["up"] + ["gate_bias"] * (gated and up_bias) + ["up_bias"] * up_bias
    assert [part.name for part in found.parts] == [*expected, "down", *["down_bias"] * down_bias]
    end = 0
    for part in found.parts:
        assert part.offset_bytes % PART_ALIGNMENT == 0
        assert end <= part.offset_bytes < end + PART_ALIGNMENT
        end = part.offset_bytes + part.size_bytes
    assert found.stride_bytes % EXPERT_ALIGNMENT == 0
    assert end <= found.stride_bytes < end + EXPERT_ALIGNMENT
    assert found.expert_bytes == sum(part.size_bytes for part in found.parts)


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_a_format_are_rows_of_bytes_and_biases_are_not(name: str) -> None:
    found = layout(dataclasses.replace(BODY, format=name))
    rows = {"gate": (9, 20), "up": (9, 20), "down": (20, 9)}
    for part in found.parts:
        plain = layout(BODY).part(part.name)
        if part.name in rows:
            n, k = rows[part.name]
            assert part.shape == (n, row_bytes(FORMATS[name], k))
            assert part.size_bytes == n * part.shape[1]
        else:
            assert (part.shape, part.size_bytes) == (plain.shape, plain.size_bytes)
        assert part.offset_bytes % PART_ALIGNMENT == 0


def test_sizes_of_a_known_body() -> None:
    found = layout(BODY)
    assert found.part("gate").size_bytes == found.part("down").size_bytes == 20 * 9 * 2
    assert found.part("up").offset_bytes == 384
    assert found.part("up_bias").shape == (9,)
    assert found.part("down_bias").shape == (20,)
    with pytest.raises(KeyError):
        found.part("nothing")
