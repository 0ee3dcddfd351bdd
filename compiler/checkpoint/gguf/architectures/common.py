"""What the architectures have in common: names, and parts of configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.architectures.record import Place, place
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moec.compiler.checkpoint.gguf.metadata import Metadata

LAYER = "model.layers.{layer}."

TRUNK: dict[str, Place] = {
    "token_embd.weight": place("model.embed_tokens.weight"),
    "output_norm.weight": place("model.norm.weight"),
    "output.weight": place("lm_head.weight"),
    "blk.{layer}.attn_norm.weight": place(LAYER + "input_layernorm.weight"),
    "blk.{layer}.ffn_norm.weight": place(LAYER + "post_attention_layernorm.weight"),
    "blk.{layer}.attn_output.weight": place(LAYER + "self_attn.o_proj.weight"),
}


def attention(rotated: bool = False) -> dict[str, Place]:
    """Queries, keys and values of plain attention."""
    return {
        "blk.{layer}.attn_q.weight": place(
            LAYER + "self_attn.q_proj.weight", rotated="num_attention_heads" if rotated else None
        ),
        "blk.{layer}.attn_k.weight": place(
            LAYER + "self_attn.k_proj.weight", rotated="num_key_value_heads" if rotated else None
        ),
        "blk.{layer}.attn_v.weight": place(LAYER + "self_attn.v_proj.weight"),
    }


def experts(router: str, prefix: str, gate: str, up: str, down: str) -> dict[str, Place]:
    """Router and routed experts; gate and up apart, or in newer files in one tensor.

    Args:
        router: the checkpoint's name of the router in a layer.
        prefix: its name of an expert, with ``{expert}``.
        gate: its name of the matrix behind the activation function.
        up: of the matrix that is multiplied with it.
        down: of the matrix back to hidden size.
    """
    gate, up, down = (f"{LAYER}{prefix}.{name}.weight" for name in (gate, up, down))
    return {
        "blk.{layer}.ffn_gate_inp.weight": place(f"{LAYER}{router}.weight"),
        "blk.{layer}.ffn_gate_exps.weight": place(gate),
        "blk.{layer}.ffn_up_exps.weight": place(up),
        "blk.{layer}.ffn_down_exps.weight": place(down),
        "blk.{layer}.ffn_gate_up_exps.weight": place(gate, up),
    }


def decoder_config(metadata: Metadata) -> dict[str, Any]:
    """What every decoder's config says in the same words."""
    return {
        "hidden_size": metadata.integer("embedding_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": metadata.integer("attention.head_count"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
    }


def routed_experts(metadata: Metadata) -> int:
    """How many there are.

    Raises:
        UnsupportedModelError: none, as in files of the architecture's dense models.
    """
    count = metadata.integer("expert_count", 0)
    if count == 0:
        raise UnsupportedModelError(
            f"{metadata.path} has no routed experts.",
            f"Its architecture is {metadata.architecture} without experts.",
            "moec compiles Mixture-of-Experts models only.",
        )
    return count


def key_value_heads(metadata: Metadata) -> int:
    """Heads of keys and values; as many as queries have where the file does not say."""
    return metadata.integer("attention.head_count_kv", metadata.integer("attention.head_count"))


def head_size(metadata: Metadata) -> int:
    """Values of a head of queries and keys."""
    own = metadata.integer("embedding_length") // metadata.integer("attention.head_count")
    return metadata.integer("attention.key_length", metadata.integer("rope.dimension_count", own))


def rotary(metadata: Metadata, **more: Any) -> dict[str, Any]:
    """``rope_parameters``; ``more`` goes in where positions are scaled by YaRN.

    Raises:
        UnsupportedModelError: positions are scaled in a way that is not known here.
    """
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.text("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    attention_factor = metadata.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("linear", "yarn") or attention_factor != 1.0:
        raise UnsupportedModelError(
            f"{metadata.path} scales positions by {kind!r} with attention factor {attention_factor}.",
            "moec reads linear and yarn from GGUF, with the usual factor.",
            "Use the checkpoint in transformers' layout.",
        )
    scaled = {"rope_type": kind, "rope_theta": theta, "factor": metadata.number("rope.scaling.factor")}
    if kind == "linear":
        return scaled
    return scaled | {
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        **more,
    }
