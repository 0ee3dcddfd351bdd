"""Experts in pinned host memory, where the GPU's kernels and copies read them, filled and hashed by several threads."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.files.verify import damaged
from moec.artifacts.paths import experts_name
from moec.runtime.devices.cuda.driver.memory import HostMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.devices.cuda.driver.resources import Resources
    from moec.runtime.experts.slots import SlotPlan

MAX_THREADS = 16


class HostTier:
    """The hosted experts of every MoE layer; the others stay in the file.

    Args:
        resources: of the GPU, for pinned memory.
        bundle: its expert files need not have been verified.
        plan: how many experts of each layer are hosted.
        hashed: files that are hashed while they are read.
        progress: told the bytes of each expert, from several threads.

    Raises:
        BundleError: a file is damaged.
        BudgetError: the system does not give so much pinned memory.
    """

    def __init__(
        self,
        resources: Resources,
        bundle: Bundle,
        plan: SlotPlan,
        hashed: Collection[str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._plan, self._resources = plan, resources
        self._memory: list[HostMemory | None] = []
        self.homes: list[NDArray[np.int64]] = []
        """Of each layer, ``[E]``: addresses in host memory, 0 for experts that are only in the file."""
        for layer in plan.layers:
            hosted = sorted(layer.order[: layer.hosted])
            memory = HostMemory(resources, len(hosted) * layer.stride_bytes) if hosted else None
            homes = np.zeros(layer.experts, np.int64)
            if memory is not None:
                homes[hosted] = memory.address + layer.stride_bytes * np.arange(len(hosted))
            self._memory.append(memory)
            self.homes.append(homes)
        self._read(bundle, hashed, progress)

    def view(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """The bytes of a hosted expert."""
        memory, stride = self._memory[layer], self._plan.layers[layer].stride_bytes
        assert memory is not None
        start = int(self.homes[layer][expert]) - memory.address
        view: NDArray[np.uint8] = memory.bytes[start : start + stride]
        return view

    def _read(self, bundle: Bundle, hashed: Collection[str], progress: Callable[[int], None] | None) -> None:
        stop = threading.Event()

        def work(layer: int) -> None:
            try:
                self._read_layer(bundle, layer, hashed, progress, stop)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            futures = [pool.submit(work, layer) for layer in range(len(self._plan.layers))]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()

    def _read_layer(
        self,
        bundle: Bundle,
        number: int,
        hashed: Collection[str],
        progress: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        """Read the file from its beginning to its end: of experts that are not hosted only what is hashed."""
        layer, name = self._plan.layers[number], experts_name(bundle.model.experts[number].layer)
        digest = hashlib.sha256() if name in hashed else None
        scratch: NDArray[np.uint8] = np.empty(layer.stride_bytes if digest else 0, np.uint8)
        with opened(bundle, name) as file:
            for expert in range(layer.experts):
                if stop.is_set():
                    return
                hosted = self.homes[number][expert] != 0
                if hosted or digest:
                    target = self.view(number, expert) if hosted else scratch
                    read_expert(file, target, expert * layer.stride_bytes, bundle, name)
                    if digest:
                        digest.update(target.data)
                    if progress:
                        progress(layer.stride_bytes)
        memory = self._memory[number]
        if memory is not None:
            self._resources.enter()
            memory.pin()
        if digest and digest.hexdigest() != bundle.manifest.files[name].sha256:
            raise damaged(bundle.path, f"The file {name} was changed: its SHA-256 is {digest.hexdigest()}.")


@contextmanager
def opened(bundle: Bundle, name: str) -> Iterator[int]:
    """A file of experts, to be read.

    Raises:
        BundleError: it is not there any more, or cannot be read.
    """
    try:
        file = os.open(bundle.path / name, os.O_RDONLY)
    except OSError as error:
        raise damaged(bundle.path, f"The file {name} cannot be read: {error.strerror}.") from error
    try:
        yield file
    finally:
        os.close(file)


def read_expert(file: int, target: NDArray[np.uint8], start: int, bundle: Bundle, name: str) -> None:
    """Fill ``target`` from an open file.

    Raises:
        BundleError: the file ends too early, or cannot be read.
    """
    done = 0
    while done < target.size:
        try:
            count = os.preadv(file, [target.data[done:]], start + done)
        except OSError as error:
            raise damaged(bundle.path, f"The file {name} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise damaged(bundle.path, f"The file {name} ends after {start + done} bytes.")
        done += count
