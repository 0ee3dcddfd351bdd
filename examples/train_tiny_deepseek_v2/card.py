"""The model card, from the figures of a run."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train_tiny_deepseek_v2.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from pathlib import Path

    from examples.train_tiny_deepseek_v2.run import Run
    from examples.train_tiny_deepseek_v2.text import Chapter

PROMPTS = (
    "In the beginning God",
    "And it came to pass",
    "The LORD is my shepherd",
    "Then Jesus said unto them,",
)


def continuations(output: Path) -> list[tuple[str, str, str]]:
    """Each prompt with its greedy and its sampled continuation, by the checkpoint as it lies there."""
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    found = []
    for number, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        greedy = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=60)
        torch.manual_seed(number)
        sampled = model.generate(**inputs, max_new_tokens=120)
        texts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (greedy, sampled)]
        found.append((prompt, texts[0], texts[1]))
    return found


def quote(text: str) -> str:
    """A Markdown block quote, line for line."""
    return "\n".join(f"> {line}  " for line in text.splitlines())


def write_card(run: Run, output: Path, train: list[Chapter]) -> Evaluation:
    """The model card, from the figures of this run alone."""
    found = evaluate(run.trainer, run.tokenizer, run.held_out)
    chosen = run.trainer.settings
    layers = "\n".join(
        f"| {number + 1} | {entropy:.4f} | {min(share):.4f} | {max(share):.4f} |"
        for number, (entropy, share) in enumerate(zip(found.entropies(), found.expert_shares, strict=True))
    )
    samples = "\n\n".join(
        f"**{prompt}**\n\nGreedy:\n\n{quote(greedy)}\n\nSampled:\n\n{quote(sampled)}"
        for prompt, greedy, sampled in continuations(output)
    )
    values = {
        "command": shlex.join(["python", "-m", "examples.train_tiny_deepseek_v2", *sys.argv[1:]]),
        "bytes": f"{(output / 'model.safetensors').stat().st_size:,}",
        "parameters": f"{sum(p.numel() for p in run.trainer.master):,}",
        "chapters": f"{len(train):,}",
        "held": f"{len(run.held_out)}",
        "tokens": f"{len(run.stream.tokens):,}",
        "steps": f"{chosen.steps:,}",
        "seen": f"{chosen.steps * chosen.batch_tokens:,}",
        "epochs": f"{chosen.steps * chosen.batch_tokens / len(run.stream.tokens):.1f}",
        "batch": f"{chosen.batch_tokens:,}",
        "minutes": f"{run.trainer.seconds / 60:.0f}",
        "nats": f"{found.nats_per_token:.4f}",
        "bits": f"{found.bits_per_byte:.4f}",
        "even": f"{math.log(len(found.expert_shares[0])):.4f}",
        "layers": layers,
        "samples": samples,
        "settings": json.dumps(asdict(chosen), indent=2),
    }
    (output / "README.md").write_text(CARD.format(**values), encoding="utf-8")
    return found


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-deepseek-v2

A small DeepSeek-V2 language model, trained from scratch, that is here so that a compiler for
Mixture-of-Experts models has a real checkpoint to compile: trained weights, real routing decisions,
text that one can read. It knows the English of one old book and nothing else.

## Architecture

`DeepseekV2ForCausalLM` of transformers, unchanged: multi-head latent attention with a query latent
(96) and a key/value latent (64), seven layers of width 192 with six heads (32 + 16 rotary query/key
dimensions, 32 value dimensions), the first layer dense (512), six Mixture-of-Experts layers with 16 routed
experts of width 64, the best 4 per token, and two shared experts. Byte-level BPE of 2048 tokens.
{parameters} parameters; `model.safetensors` holds them in bfloat16 ({bytes} bytes), each matrix of each
expert a tensor of its own, as the published DeepSeek-V2 checkpoints have it.

## Data

The King James Version of 1611, from the Debian package `bible-kjv-text`
(`apt-get install bible-kjv`, then `bible -f gen1:1-rev22:21`), without the verse numbers, two to four
verses to a line, `<|begin|>` before and `<|end|>` after each chapter. {chapters} chapters ({tokens} tokens)
were trained on; {held} chapters, chosen by the hash of their name, were held out, from the tokenizer too.

## Training

```
{command}
```

{steps} steps of {batch} tokens ({seen} tokens, {epochs} epochs), in rows of 256 tokens and every fourth
step of 512; {minutes} minutes by the clock. AdamW, bfloat16 forward and backward passes over float32
weights. Each MoE layer has the load-balancing loss of Switch and DeepSeek (experts x sum of choice share x
mean probability). Contexts of more than 512 tokens were not trained. The settings (`rates` are the points,
step:share, between which the learning rate runs along lines, and on to zero at the last step):

```json
{settings}
```

## Held-out results

Measured on the bfloat16 weights, over non-overlapping windows of 512 tokens: **{nats} nats per token,
{bits} bits per byte**.

Use of the routed experts over the same text (even use has an entropy of ln 16 = {even} nats and a
share of 0.0625 for each expert; layer 0 is dense):

| layer | entropy (nats) | least share | greatest share |
| --- | --- | --- | --- |
{layers}

## Text

As it came out, greedy and with `generation_config.json` as it is:

{samples}

## Licence

The text is in the public domain (in the United Kingdom the Crown holds rights in its printing). The weights
and the tokenizer are under Apache-2.0.
"""
