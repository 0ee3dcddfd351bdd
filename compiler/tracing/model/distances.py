"""Relative position biases by bucket (T5, arXiv 1910.10683): which bucket each distance within reach has."""

from __future__ import annotations

import torch

BUCKETS = "distance_buckets"
"""Name of the buffer that modules with a relative position bias get."""


def add_distance_buckets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give each module with such a bias a buffer with the buckets of distances ``-reach .. reach``.

    Beyond its reach (``relative_attention_max_distance``) all distances of one sign share a bucket.

    Returns:
        The buckets, int64 ``[2 * reach + 1]``, by the path of the buffer.
    """
    values: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "relative_attention_bias"):
            continue
        reach = int(module.relative_attention_max_distance)
        buckets: torch.Tensor = module._relative_position_bucket(
            torch.arange(-reach, reach + 1),
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=reach,
        )
        module.register_buffer(BUCKETS, buckets.to("meta"), persistent=False)
        values[f"{path}.{BUCKETS}"] = buckets
    return values
