"""``generation_config.json`` of a GGUF model: which tokens begin and end a text, and how it wants to be sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.metadata import Metadata

CONTROL = 3
"""Of ``token_type``: a token that is no text."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of tokens that end a text, a turn, a message."""
ENDING_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|return|>",
    "<|call|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)
"""Control tokens that end an answer, whether a key says so or not: files have one key for each kind, and models several
tokens. Without ``<|end|>``, behind which gpt-oss goes on in another channel."""
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
}


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """The generation defaults that the metadata has."""
    values = metadata.values
    ends = {int(values[f"tokenizer.ggml.{key}"]) for key in ENDS if f"tokenizer.ggml.{key}" in values}
    types = values.get("tokenizer.ggml.token_type") or ()
    for number, (token, kind) in enumerate(
        zip(values.get("tokenizer.ggml.tokens") or (), types, strict=False)
    ):
        if kind == CONTROL and token in ENDING_TOKENS:
            ends.add(number)
    found: dict[str, Any] = {"eos_token_id": sorted(ends)} if ends else {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if f"tokenizer.ggml.{key}" in values:
            found[name] = int(values[f"tokenizer.ggml.{key}"])
    sampling = {name: values[key] for key, name in SAMPLING.items() if key in values}
    return found | sampling | ({"do_sample": True} if sampling else {})
