"""Whether the records of a bundle agree with each other and with the weight files: problems, one sentence each."""

from moec.artifacts.files.checks.machine import machine_problems
from moec.artifacts.files.checks.manifest import manifest_problems
from moec.artifacts.files.checks.model import model_problems
from moec.artifacts.files.checks.program import program_problems
from moec.artifacts.files.checks.schedule import schedule_problems
from moec.artifacts.files.checks.weights import dense_problems, experts_problems

__all__ = [
    "dense_problems",
    "experts_problems",
    "machine_problems",
    "manifest_problems",
    "model_problems",
    "program_problems",
    "schedule_problems",
]
