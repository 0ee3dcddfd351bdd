"""What moec imports from packages that are not its own, and which extra installs it."""

from __future__ import annotations

RUNTIME_PACKAGES = ("tvm_ffi", "numpy", "tokenizers", "jinja2", "jsonschema")
SERVER_PACKAGES = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")
COMPILE_PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface_hub", "tvm"),
    *("compressed_tensors", "gguf", "threadpoolctl"),
)


def extra_of(package: str) -> str:
    """The extra of moec that installs ``package``, named as it is imported."""
    return "serve" if package in SERVER_PACKAGES else "compile"
