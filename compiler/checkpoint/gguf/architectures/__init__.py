"""The GGUF architectures that moec reads. Names and keys are those of llama.cpp's converter."""

from moec.compiler.checkpoint.gguf.architectures.deepseek2 import DEEPSEEK2
from moec.compiler.checkpoint.gguf.architectures.gpt_oss import GPT_OSS
from moec.compiler.checkpoint.gguf.architectures.llama import LLAMA
from moec.compiler.checkpoint.gguf.architectures.qwen3moe import QWEN3MOE
from moec.compiler.checkpoint.gguf.architectures.record import GgufArchitecture

ARCHITECTURES: dict[str, GgufArchitecture] = {
    "deepseek2": DEEPSEEK2,
    "gpt-oss": GPT_OSS,
    "llama": LLAMA,
    "qwen3moe": QWEN3MOE,
}
"""By ``general.architecture``."""
