"""Rounding with feedback in tests: a policy of it, and what it is calibrated on."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.compiler.profiling.calibration import Prompt
from moec.compiler.quantization import policy_named
from moec.compiler.request import Calibration

TOKENS = torch.randint(2, 120, (6, 100), generator=torch.Generator().manual_seed(0)).tolist()
CALIBRATION = Calibration(prompts=tuple(Prompt(None, tuple(ids)) for ids in TOKENS))
FEEDBACK = replace(policy_named("int4"), method="feedback")
