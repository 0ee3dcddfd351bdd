from __future__ import annotations

from typing import Any

import pytest

from moec.errors import DeviceError, RequestError
from moec.runtime.devices.names import budgets_of, parse_ordinals


@pytest.mark.parametrize(
    ("device", "ordinals"),
    [
        ("cpu", ()),
        ("cuda", (0,)),
        ("cuda:1", (1,)),
        ("cuda:1,cuda:0", (1, 0)),
        (["cuda:0", "cuda:2"], (0, 2)),
        (("cuda:0",), (0,)),
    ],
)
def test_devices_are_one_or_several_gpus(device: str | list[str], ordinals: tuple[int, ...]) -> None:
    assert parse_ordinals(device) == ordinals


@pytest.mark.parametrize(
    ("device", "what"),
    [
        ("cuda:0,cuda", "cuda:0 is named twice"),
        (["cuda:1", "cuda:1"], "cuda:1 is named twice"),
        ("cpu,cuda:0", "no device 'cpu'"),
        ("tpu", "no device 'tpu'"),
        ("cuda:0,", "no device ''"),
        ([], "no device ''"),
        ("cuda:x", "no device 'cuda:x'"),
        ("cuda:²", "no device 'cuda:²'"),
        (None, "no device None"),
        (["cuda:0", 1], "no device 1"),
    ],
)
def test_others_are_named(device: Any, what: str) -> None:
    with pytest.raises(DeviceError, match=what):
        parse_ordinals(device)


def test_a_budget_is_for_each_gpu_or_there_is_one_for_each() -> None:
    assert budgets_of(None, 2) == (None, None)
    assert budgets_of("8GiB", 2) == ("8GiB", "8GiB")
    assert budgets_of("8GiB, 6GiB", 2) == ("8GiB", "6GiB")
    assert budgets_of([0.5, None], 2) == (0.5, None)
    with pytest.raises(RequestError, match="2 amounts for one GPU"):
        budgets_of("1,2", 1)
    with pytest.raises(RequestError, match="3 amounts for 2 GPUs"):
        budgets_of([1, 2, 3], 2)
