"""Architectures of our own: models that transformers does not have, behind the same interfaces as its own.

A file a family; ``docs/decisions/0017`` says why they look as they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.architectures.arctic import ARCTIC
from moec.compiler.architectures.grok import GROK, GROK_OF_KEYFAN

if TYPE_CHECKING:
    from moec.compiler.architectures.record import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    architecture.config.model_type: architecture for architecture in (ARCTIC, GROK, GROK_OF_KEYFAN)
}
"""``model_type`` of ``config.json`` -> the model."""
