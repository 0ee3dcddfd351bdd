"""The checkpoint as it is shipped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from transformers import DeepseekV2ForCausalLM, GenerationConfig

from examples.train_tiny_deepseek_v2.architecture import make_config
from examples.train_tiny_deepseek_v2.tokenizer import BEGIN_ID, END_ID, PAD_ID

if TYPE_CHECKING:
    from pathlib import Path

    from examples.train_tiny_deepseek_v2.run import Run


def export(run: Run, output: Path) -> None:
    """Writes the checkpoint in the published layout, one tensor per expert's matrix."""
    config = make_config(run.trainer.model.config.vocab_size)
    config.dtype = torch.bfloat16
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(run.trainer.model.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=200,
    )
    model.save_pretrained(output)
    run.tokenizer.save_pretrained(output)
    settings = output / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    known["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older releases know too
    settings.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for path in output.iterdir():
        path.chmod(0o644)
