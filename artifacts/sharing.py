"""How many of a layer's missing experts the CPU computes while the GPU fetches the others. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


MAILBOX_US = 8.0
"""Of a layer whose request has no experts, less one without a request, on an H100: with one CPU thread or with few."""
TEAM_US = 7.0
"""What 15 threads take for any request besides reading memory; a measured time of experts on the CPU has it already."""
COPY_US = 9.0
"""What an expert that the copy engine brings takes of the link beside its bytes: 7 to 12 on an H200, 2.7 to 17 MB."""
MOST_SHARED_TOKENS = 1024
"""Of a step of many tokens: with more an expert has so many that the link brings it long before the CPU is done."""
HANDING_US = 100.0
"""Of a layer of many tokens of which the CPU computes a share: waking its threads, all copies of rows and sums beside
their bytes."""
ASKING_US = 1000.0
"""Of such a layer beside link and CPU: its GPU's own work, which a stream hides that asks no router, and the host's."""
WORTH_ASKING = 0.8
"""Of the time over the link alone: where all that is to take more, the link is left alone. On an H200 the CPU took up
to half as long again as it was to, and not the same from run to run; nothing that this lets through took longer."""


@dataclass(frozen=True)
class ShareSpeeds:
    """What one expert of a layer costs on either way, in microseconds."""

    link_us: float
    """Of bringing one expert to the GPU; so many of them take so many times as long."""
    cpu_us: tuple[float, ...]
    """Entry k: of computing k experts at once in host memory; entry 0 is 0. Beyond the last entry each costs what the
    last did."""
    handshake_us: float
    """Of telling the CPU and of taking its result, where it computes any."""

    def on_cpu(self, experts: int) -> float:
        """Microseconds until the result of ``experts`` experts is on the GPU."""
        if experts == 0:
            return 0.0
        known = min(experts, len(self.cpu_us) - 1)
        each = self.cpu_us[-1] - self.cpu_us[-2]
        return self.handshake_us + self.cpu_us[known] + (experts - known) * each

    def of(self, misses: int, by_cpu: int) -> float:
        """Microseconds for ``misses`` missing experts, of which the CPU computes ``by_cpu``."""
        return max((misses - by_cpu) * self.link_us, self.on_cpu(by_cpu))


def cpu_shares(speeds: ShareSpeeds, most: int) -> tuple[int, ...]:
    """Entry m, for m of 0 to ``most``: of m missing experts the CPU computes so many; the fewest that is fastest.

    Args:
        speeds: at least one expert on the CPU must be known.
        most: misses.
    """
    assert len(speeds.cpu_us) > 1
    return tuple(
        min(range(misses + 1), key=lambda n: (speeds.of(misses, n), n)) for misses in range(most + 1)
    )


def worth_uses(speeds: ShareSpeeds) -> float:
    """By how many uses an expert must be ahead of who leaves for it, to be fetched though the CPU would compute it.

    Uses fade as the policy says. What is lost now is the link's time less the CPU's; what is won is the CPU's time,
    whenever it is wanted and the other one is not (decision 44).
    """
    return 1.5 + 0.5 * max(0.0, speeds.link_us / speeds.on_cpu(1) - 1)


@dataclass(frozen=True)
class ManySpeeds:
    """What an expert with many tokens costs on either way, in microseconds."""

    link_us: float
    """Of bringing one expert to the GPU, whatever its tokens."""
    tokens: tuple[int, ...]
    """Rising, at least two."""
    cpu_us: tuple[float, ...]
    """Of an expert with so many tokens on the CPU; on straight lines between, and beyond on the last one."""
    handing_us: float
    """Of bringing the CPU its rows and their sums back, where it computes any."""

    def on_cpu(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Microseconds of experts with so many tokens each."""
        each = np.asarray(tokens, np.float64)
        (before, last), (earlier, latest) = self.tokens[-2:], self.cpu_us[-2:]
        beyond = np.maximum(each - last, 0) * (latest - earlier) / (last - before)
        return np.asarray(np.interp(each, self.tokens, self.cpu_us) + beyond)

    def times(self, tokens: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        """Entry n: until missing experts with so many tokens are done of which the CPU computes the first n."""
        cpu = np.concatenate([[0.0], self.handing_us + np.cumsum(self.on_cpu(tokens))])
        left = np.arange(len(tokens), -1, -1, dtype=np.float64)
        return np.asarray(np.maximum(cpu, self.link_us * left))


def cpu_share_of_many(speeds: ManySpeeds, tokens: Sequence[float] | NDArray[Any]) -> int:
    """How many of the first of missing experts, with so many tokens in rising order, the CPU computes to be done first.

    The fewest of those that are as fast. An expert with fewer tokens costs the CPU less; to the link all are alike.
    """
    return int(np.argmin(speeds.times(tokens)))


def worth_asking(speeds: ManySpeeds, each: float, missing: int, lead: int) -> bool:
    """Whether the CPU is to have a share of a layer's missing experts, expected to have ``each`` tokens.

    ``lead`` of them the link brings while the router is waited for.
    """
    shared = float(speeds.times([each] * (missing - lead)).min()) + ASKING_US
    return shared < WORTH_ASKING * speeds.link_us * missing


@dataclass(frozen=True)
class TeamSpeed:
    """How fast a CPU's threads compute experts, on a straight line through measured times."""

    start_us: float
    """Of a request of any number of experts."""
    gb_s: float
    """Bytes of experts beyond that, where 1 GB is 10^9 bytes."""

    @classmethod
    def of(cls, cpu_us: Sequence[float], expert_bytes: int) -> TeamSpeed | None:
        """The line of least squares; ``None`` where no expert was measured.

        Args:
            cpu_us: entry k: microseconds of k experts, entry 0 is 0 and no measurement.
            expert_bytes: of each.
        """
        known = list(enumerate(cpu_us))[1:]
        if not known:
            return None
        mean, middle = sum(us for _, us in known) / len(known), (len(known) + 1) / 2
        spread = sum((k - middle) ** 2 for k, _ in known)
        # Less than nothing to start with, or more than the experts themselves, is noise.
        most = mean / middle
        rise = sum((k - middle) * us for k, us in known) / spread if spread else most
        each = min(max(rise, most / 2), most)
        return cls(mean - each * middle, expert_bytes / each / 1e3)


STEADY, STEADY_US = 1.6, 40.0
"""Times as long as so many of the experts before may a number of experts take, and microseconds beside."""


def is_steady(samples: Sequence[float]) -> bool:
    """Whether measured times of 0, 1, 2 ... experts rise with their number as reading them does, or more slowly."""
    return all(
        samples[count] <= STEADY * samples[count - 1] * count / (count - 1) + STEADY_US
        for count in range(2, len(samples))
    )


def never_falling(samples: Sequence[float]) -> tuple[float, ...]:
    """Measured times of 0, 1, 2 ... experts, cleared of the noise by which more would cost less."""
    result: list[float] = []
    for sample in samples:
        result.append(max(sample, result[-1] if result else 0.0))
    return tuple(result)
