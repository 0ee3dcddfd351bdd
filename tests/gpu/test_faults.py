"""What goes wrong while a model with experts off the GPU loads or decodes, in processes of their own.

After each the GPU's memory and the host's are free again, and the bundle is as it was.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.budgets import host_limit, limit_of_share, resident_plan
from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import footprint
from moec.errors import BudgetError, BundleError
from moec.runtime.devices.cuda.driver.functions import OutOfDeviceMemoryError
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from tests.gpu.conftest import Load
from tests.gpu.test_model import greedy, used_bytes

STEP: dict[str, Any] = {"max_step_tokens": 160, "max_batch": 2, "cache_tokens": 512, "device": "cuda:0"}
SOME_BYTES = 8 << 20
"""Of GPU memory that the driver may keep, and of pinned memory that others may take meanwhile."""
SECONDS = 60

DECODE = """
import sys
from moec import runtime
from moec.errors import MoecError
model = runtime.load(sys.argv[1], verify="sizes", device="cuda:0", device_memory=int(sys.argv[2]),
                     cpu_threads=int(sys.argv[3]), copy_thread=sys.argv[5] == "True",
                     max_step_tokens=160, max_batch=2, cache_tokens=512)
try:
    with model:
        experts = model._executor.sections[0].experts
        print("ready", flush=True)
        for turn in range(1000000):
            if sys.argv[4] == "break" and turn == 3:
                import numpy as np
                for layer, plan in enumerate(experts.slots.plan.layers):
                    for expert in range(plan.experts):
                        home = experts.slots.states.home(layer, expert)
                        experts._device.write(home, np.array([0x7], np.int64))
            model.generate([[11 + turn % 50, 12, 13]], max_new_tokens=16, do_sample=False, eos_token_id=[])
except MoecError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def budget(bundle: Path) -> int:
    """Device memory with room for a quarter of the experts."""
    return limit_of_share(bundle, 0.25, 3, max_batch=2, step_tokens=160, cache_tokens=512)


@pytest.fixture
def started(bundle: Path, budget: int, request: pytest.FixtureRequest) -> Any:
    """A process that decodes, and what was in use before it."""
    threads, mode, fed = request.param
    before = used_bytes(), locked_bytes()
    command = [sys.executable, "-c", DECODE, str(bundle), str(budget), str(threads), mode, str(fed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process, before
    process.kill()
    process.communicate()


def locked_bytes() -> int:
    """Host memory that is no longer available to others."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return facts["MemTotal"] - facts["MemAvailable"]


def check_nothing_is_left(before: tuple[int, int], bundle: Path) -> None:
    until = time.monotonic() + 10
    while used_bytes() - before[0] > SOME_BYTES and time.monotonic() < until:
        time.sleep(0.1)
    assert used_bytes() - before[0] <= SOME_BYTES
    assert locked_bytes() - before[1] <= 32 * SOME_BYTES
    open_bundle(bundle, verify="full")


@pytest.mark.parametrize(
    "started", [(0, "run", False), (3, "run", False), (0, "run", True), (3, "run", True)], indirect=True
)
def test_ctrl_c_while_decoding_ends_cleanly(started: Any, bundle: Path) -> None:
    process, before = started
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=SECONDS)
    assert "KeyboardInterrupt" in said
    assert process.returncode in (1, 130, -signal.SIGINT)
    check_nothing_is_left(before, bundle)


@pytest.mark.parametrize(
    "started", [(0, "run", False), (3, "run", False), (0, "run", True), (3, "run", True)], indirect=True
)
def test_a_killed_process_leaves_nothing(started: Any, bundle: Path) -> None:
    process, before = started
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=SECONDS)
    check_nothing_is_left(before, bundle)


@pytest.mark.parametrize("started", [(0, "break", False)], indirect=True)
def test_a_kernels_error_is_typed_and_the_process_ends(started: Any, bundle: Path) -> None:
    process, before = started
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, said
    assert said.startswith("DeviceError")
    check_nothing_is_left(before, bundle)


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_host_memory_that_is_not_given_is_a_typed_error(
    load: Load, budget: int, bundle: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    load(**STEP, device_memory=budget).close()
    before = used_bytes(), locked_bytes()
    register, calls = NvidiaDriver.register, iter(range(allowed))

    def limited(driver: NvidiaDriver, address: int, size_bytes: int) -> None:
        if next(calls, None) is None:
            raise OutOfDeviceMemoryError
        register(driver, address, size_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(NvidiaDriver, "register", limited)
        with pytest.raises(BudgetError, match="cannot be pinned"):
            load(**STEP, device_memory=budget)
    check_nothing_is_left(before, bundle)


def test_a_file_that_is_truncated_while_it_is_used_is_a_typed_error(
    bundle: Path, budget: int, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    before = used_bytes(), locked_bytes()
    plan = resident_plan(bundle, max_batch=2, step_tokens=160, cache_tokens=512)
    host = host_limit(plan, footprint(open_bundle(bundle, verify="sizes").model), 0.6)
    limits: dict[str, Any] = {"device_memory": budget, "host_memory": host, "cpu_threads": 0}
    with runtime.load(copy, verify="sizes", **STEP, **limits) as model:
        greedy(model, [[5, 6, 7]])
        for path in (copy / "weights").glob("experts-*"):
            path.write_bytes(path.read_bytes()[:4096])
        with pytest.raises(BundleError, match="ends after"):
            greedy(model, [list(range(100, 250))])
    check_nothing_is_left(before, bundle)
    with pytest.raises(BundleError):
        runtime.load(copy, **STEP)
