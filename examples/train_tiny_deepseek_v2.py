"""Train the small DeepSeek-V2 checkpoint that is kept in ``examples/tiny-deepseek-v2``.

The text is the King James Version (1611, public domain) as the Debian package ``bible-kjv-text``
has it.  Get it with ``apt-get install bible-kjv``; without ``--text`` this script calls the
package's program itself (``bible -f gen1:1-rev22:21``), and ``--text`` names a file that holds that
program's output instead.

The model is transformers' own ``DeepseekV2ForCausalLM``; only three things are put in its way while
it trains, none of which is in the checkpoint: a faster grouped expert product, a causal attention
that is cheap on a CPU, and dropout on the residual branches.  The weights the forward pass uses are
bfloat16 (so the held-out loss is the loss of the checkpoint as shipped), the optimizer's are float32.

The learning rate runs along lines between the points of ``--rates`` and on to zero at ``--steps``: a
warm-up, a plateau, a slow and then a faster fall.  A run can be resumed from its work folder, also with
other points and another end, as long as the steps that were done had the same rates; so it is always
the run that its command makes from the start.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BEGIN_ID, END_ID, PAD_ID = 0, 1, 2
VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$")
WINDOW = 512
RATES = "0:0.005,199:1,1920:1,2400:0.625"
WORK = Path(tempfile.gettempdir()) / "train"
PROMPTS = (
    "In the beginning God",
    "And it came to pass",
    "The LORD is my shepherd",
    "Then Jesus said unto them,",
)


@dataclass(frozen=True)
class Settings:
    """What decides the result; the file names and the thread count do not."""

    steps: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    dropout: float
    balance: float
    rates: str
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step: lines between the points of ``rates``, and to zero at the end."""
        points = [point.split(":") for point in self.rates.split(",")]
        ways = [(int(at), float(share)) for at, share in points] + [(self.steps, 0.0)]
        for (low, first), (high, second) in pairwise(ways):
            if step < high:
                return self.learning_rate * (first + (second - first) * (step - low) / (high - low))
        return 0.0

    def check_resumes(self, saved: dict[str, Any], step: int) -> None:
        """Refuses a saved state that a run with these settings would not have come by."""
        other = Settings(**saved)
        if replace(other, steps=self.steps, rates=self.rates) != self:
            raise click.ClickException(f"the saved state is of another run: {saved}")
        if any(not math.isclose(self.rate(at), other.rate(at), rel_tol=1e-9) for at in range(step)):
            raise click.ClickException("the learning rate of the steps that were done is another")


@dataclass(frozen=True)
class Chapter:
    """One chapter as prose: a few verses to the line, without their numbers."""

    name: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole chapter."""
        return "\n".join(self.lines)

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: one chapter in twenty, by the hash of its name."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % 20 == 0


@dataclass(frozen=True)
class Evaluation:
    """What the held-out chapters say of the model."""

    nats_per_token: float
    bits_per_byte: float
    expert_shares: list[list[float]]

    def entropies(self) -> list[float]:
        """Entropy (nats) of the expert use of every MoE layer."""
        return [-sum(p * math.log(p) for p in layer if p > 0) for layer in self.expert_shares]


# ---------------------------------------------------------------- text and tokens


def keep_memory() -> None:
    """Has the C library keep freed memory: fresh pages at every step took a third of the time."""
    library = ctypes.CDLL(None)
    no_maps, no_trim = library.mallopt(-4, 0), library.mallopt(-1, 2**31 - 1)
    if not (no_maps and no_trim):
        click.echo("the C library does not keep its memory; the run is right but slower", err=True)


def read_text(path: Path | None) -> str:
    """The whole text, a verse a line, from a file or from the package's program."""
    if path is not None:
        return path.read_text(encoding="ascii")
    command = ["bible", "-f", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def to_lines(name: str, verses: list[str]) -> tuple[str, ...]:
    """Joins two to four verses to a line, as the chapter's name has it."""
    rng = random.Random(name)
    lines: list[str] = []
    at = 0
    while at < len(verses):
        count = rng.randint(2, 4)
        lines.append(" ".join(verses[at : at + count]))
        at += count
    return tuple(lines)


def to_chapters(text: str) -> list[Chapter]:
    """Takes the verse marks off and gathers the verses of each chapter."""
    verses: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = VERSE.match(line)
        if match is None:
            raise click.ClickException(f"not a verse: {line!r}")
        book, chapter, _, words = match.groups()
        verses.setdefault(f"{book} {chapter}", []).append(words.strip())
    return [Chapter(name, to_lines(name, found)) for name, found in verses.items()]


def train_tokenizer(chapters: list[Chapter], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the begin token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((chapter.text for chapter in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, BEGIN_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_chapter(tokenizer: PreTrainedTokenizerFast, chapter: Chapter) -> tuple[list[int], list[int]]:
    """The chapter's tokens, between begin and end, and where its lines start in them."""
    tokens, starts = [BEGIN_ID], []
    for number, line in enumerate(chapter.lines):
        starts.append(len(tokens))
        piece = line if number == len(chapter.lines) - 1 else line + "\n"
        tokens.extend(tokenizer.encode(piece, add_special_tokens=False))
    tokens.append(END_ID)
    return tokens, starts


class Stream:
    """The training chapters end to end, given out as shuffled windows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter], seed: int) -> None:
        tokens: list[int] = []
        starts: list[int] = []
        for chapter in chapters:
            found, lines = encode_chapter(tokenizer, chapter)
            starts.extend(len(tokens) + at for at in lines)
            tokens.extend(found)
        self.tokens = torch.tensor(tokens)
        self.starts = torch.tensor(starts)
        self.seed = seed
        self.per_epoch = (len(tokens) - 2 * WINDOW) // WINDOW
        self.epoch = -1
        self.windows: list[torch.Tensor] = []

    def _load_epoch(self, epoch: int) -> None:
        """Cuts the stream at a new phase; half of the windows are moved on to begin at a line."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        phase = int(torch.randint(WINDOW, (1,), generator=rng))
        order = torch.randperm(self.per_epoch, generator=rng).tolist()
        at_line = (torch.rand(self.per_epoch, generator=rng) < 0.5).tolist()
        self.windows = [self._window(phase + k * WINDOW, at_line[k]) for k in order]
        self.epoch = epoch

    def _window(self, start: int, at_line: bool) -> torch.Tensor:
        if not at_line:
            return self.tokens[start : start + WINDOW + 1]
        index = min(int(torch.searchsorted(self.starts, start)), len(self.starts) - 1)
        line = min(int(self.starts[index]), len(self.tokens) - WINDOW)
        return torch.cat((torch.tensor([BEGIN_ID]), self.tokens[line : line + WINDOW]))

    def batch(self, step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and targets of a step: one in four steps of long rows, the others of half rows."""
        picked: list[torch.Tensor] = []
        for number in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                self._load_epoch(epoch)
            picked.append(self.windows[at])
        window = torch.stack(picked)
        length = WINDOW if step % 4 == 3 else WINDOW // 2
        return window[:, :-1].reshape(-1, length), window[:, 1:].reshape(-1, length)


# ---------------------------------------------------------------- model


def make_config(vocab_size: int) -> DeepseekV2Config:
    """DeepSeek-V2 with every part of the published one: both latents, a dense layer, shared experts."""
    return DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=7,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        topk_method="greedy",
        norm_topk_prob=False,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


class GroupedProduct(torch.autograd.Function):
    """Rows that lie expert by expert, each times the matrix of its expert."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """One product per expert."""
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, (low, high) in enumerate(spans(ends)):
            torch.mm(rows[low:high], weight[expert].t(), out=out[low:high])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Two products per expert."""
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows_grad, weight_grad = torch.empty_like(rows), torch.empty_like(weight)
        for expert, (low, high) in enumerate(spans(ctx.ends)):
            torch.mm(grad[low:high], weight[expert], out=rows_grad[low:high])
            torch.mm(grad[low:high].t(), rows[low:high], out=weight_grad[expert])
        return rows_grad, weight_grad, None


class Dispatch(torch.autograd.Function):
    """Copies every token's row to the places of its choices; the gradient gathers them again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, source: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The row of the token of every place."""
        ctx.save_for_backward(places)
        return hidden.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Each token's sum over its places."""
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places.reshape(-1)).view(*places.shape, -1).sum(1), None, None


class Collect(torch.autograd.Function):
    """The rows at the given places, of which no two are the same."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The rows of the places."""
        ctx.save_for_backward(places)
        ctx.count = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Each gradient row to its place, zeros between."""
        (places,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, places, grad), None


def spans(ends: list[int]) -> Iterator[tuple[int, int]]:
    """The first row and the one past the last of every expert."""
    return zip([0, *ends[:-1]], ends, strict=True)


def arrange(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The token of each row, the row of each choice, and where each expert's rows end.

    The rows of an expert are rounded up to a multiple of 64: products then have few shapes, and the
    library that does them prepares each shape once.
    """
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts)
    rounded = (counts + 63) // 64 * 64
    ends = rounded.cumsum(0)
    shift = (ends - rounded) - (counts.cumsum(0) - counts)
    rows = torch.arange(chosen.numel()) + shift[chosen]
    places = torch.empty_like(order).scatter_(0, order, rows)
    source = order.new_zeros(int(ends[-1])).scatter_(0, rows, order // top_k_index.shape[-1])
    return source, places.view_as(top_k_index), ends.tolist()


def grouped_experts(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts of a layer: rows laid out by expert, one product per expert, and back."""
    source, places, ends = arrange(top_k_index, experts.num_experts)
    rows = Dispatch.apply(hidden, source, places)  # type: ignore[no-untyped-call]
    gate, up = GroupedProduct.apply(rows, experts.gate_up_proj, ends).chunk(2, dim=-1)  # type: ignore[no-untyped-call]
    out = GroupedProduct.apply(functional.silu(gate) * up, experts.down_proj, ends)  # type: ignore[no-untyped-call]
    out = Collect.apply(out, places.reshape(-1)).view(*places.shape, -1)  # type: ignore[no-untyped-call]
    return torch.bmm(top_k_weights.to(out.dtype).unsqueeze(1), out).squeeze(1)


def causal_attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention over rows without padding at their left."""
    length = query.shape[2]
    bias = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scaling)
    out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return out.view(*value.shape).transpose(1, 2), None


class Router:
    """Hears what every gate decides in a forward pass."""

    def __init__(self, model: DeepseekV2ForCausalLM) -> None:
        self.heard: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.heard.append((output[0], output[2]))

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The logits and choices of every layer since the last call."""
        heard, self.heard = self.heard, []
        return heard


def balance_loss(heard: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Experts times the sum of (share of choices x mean probability), meaned over layers; 1 is even."""
    losses = []
    for logits, choices in heard:
        experts = logits.shape[-1]
        share = torch.bincount(choices.reshape(-1), minlength=experts) / choices.numel()
        losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


class Dropout:
    """Dropout on the embeddings and on what each branch adds to the residual stream.

    The masks are cut at random places out of one long one, which costs far less than new ones.
    """

    def __init__(self, rate: float) -> None:
        drawn = torch.rand(2**23, generator=torch.Generator().manual_seed(0)) >= rate
        self.mask = (drawn / (1 - rate)).to(torch.bfloat16)

    def __call__(self, module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """Drops, as a forward hook does."""
        if not module.training:
            return output
        start = int(torch.randint(self.mask.numel() - output.numel(), (1,))) // 32 * 32
        return output * self.mask[start : start + output.numel()].view_as(output)

    def attach(self, model: DeepseekV2ForCausalLM) -> None:
        """Hooks it into the model."""
        model.model.embed_tokens.register_forward_hook(self)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(self)
            layer.mlp.register_forward_hook(self)


def make_model(config: DeepseekV2Config, seed: int) -> DeepseekV2ForCausalLM:
    """Fresh float32 weights; what writes to the residual stream starts smaller."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and re.search(r"o_proj|down_proj", name):
                weight.mul_(scale)
    return model


# ---------------------------------------------------------------- training


class Trainer:
    """A bfloat16 model, its float32 weights and the optimizer of those."""

    def __init__(self, config: DeepseekV2Config, settings: Settings) -> None:
        self.settings = settings
        self.step = 0
        self.seconds = 0.0
        fresh = make_model(config, settings.seed)
        self.master = [p.detach().clone().requires_grad_() for p in fresh.parameters()]
        self.model = fresh.to(torch.bfloat16)
        self.model.set_attn_implementation("tiny_causal")
        self.model.set_experts_implementation("tiny_grouped")
        self.router = Router(self.model)
        if settings.dropout > 0:
            Dropout(settings.dropout).attach(self.model)
        groups = [
            {"params": [p for p in self.master if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.master if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def train_step(self, stream: Stream) -> tuple[float, float]:
        """One batch: gives its loss and its balance loss."""
        torch.manual_seed(self.settings.seed * 7_919 + self.step)
        inputs, targets = stream.batch(self.step, self.settings.batch_tokens // WINDOW)
        self.model.train()
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        balance = balance_loss(self.router.take())
        (loss + self.settings.balance * balance).backward()  # type: ignore[no-untyped-call]
        self._update()
        self.step += 1
        return loss.item(), balance.item()

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        for master, weight in zip(self.master, self.model.parameters(), strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the float32 weights into the model."""
        for master, weight in zip(self.master, self.model.parameters(), strict=True):
            weight.copy_(master)

    def save(self, path: Path) -> None:
        """Writes all that a resumed run needs, then puts it in place."""
        state = {
            "master": [p.detach() for p in self.master],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a saved state of this run, or of one that differs in steps not yet begun."""
        state = torch.load(path, weights_only=True)
        self.settings.check_resumes(state["settings"], state["step"])
        with torch.no_grad():
            for master, saved in zip(self.master, state["master"], strict=True):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.publish()


@torch.no_grad()
def evaluate(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter]) -> Evaluation:
    """The loss over the held-out chapters, in windows that do not overlap, and the use of experts."""
    model = trainer.model.eval()
    nats, tokens = 0.0, 0
    uses: list[torch.Tensor] = []
    for inputs, targets in held_out_batches(tokenizer, chapters):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        real = targets.flatten() != PAD_ID
        nats += functional.cross_entropy(logits[real], targets.flatten()[real], reduction="sum").item()
        tokens += int(real.sum())
        counts = [
            torch.bincount(c[real].reshape(-1), minlength=s.shape[-1]) for s, c in trainer.router.take()
        ]
        uses = counts if not uses else [a + b for a, b in zip(uses, counts, strict=True)]
    size = sum(len(chapter.text.encode()) for chapter in chapters)
    shares = [(use / use.sum()).tolist() for use in uses]
    return Evaluation(nats / tokens, nats / math.log(2) / size, shares)


def held_out_batches(
    tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, padded at the right to the window."""
    rows: list[list[int]] = []
    for chapter in chapters:
        tokens, _ = encode_chapter(tokenizer, chapter)
        rows.extend(tokens[at : at + WINDOW + 1] for at in range(0, len(tokens) - 1, WINDOW))
    for at in range(0, len(rows), 16):
        part = [row + [PAD_ID] * (WINDOW + 1 - len(row)) for row in rows[at : at + 16]]
        batch = torch.tensor(part)
        yield batch[:, :-1], batch[:, 1:]


@dataclass
class Run:
    """A training run: what it trains, on what, and where it keeps its state."""

    trainer: Trainer
    tokenizer: PreTrainedTokenizerFast
    stream: Stream
    held_out: list[Chapter]
    work: Path
    every: int

    def train(self) -> None:
        """Trains to the last step, with a held-out loss and a saved state now and then."""
        started = time.monotonic() - self.trainer.seconds
        loss, last = 0.0, self.trainer.settings.steps
        while self.trainer.step < last:
            now, balance = self.trainer.train_step(self.stream)
            loss = now if loss == 0.0 else 0.95 * loss + 0.05 * now
            self.trainer.seconds = time.monotonic() - started
            if self.trainer.step % 20 == 0:
                self._say(f"loss {loss:.4f} balance {balance:.4f}")
            if self.trainer.step % self.every == 0:
                self.trainer.save(self.work / "state.pt")
                self._report()

    def _say(self, words: str) -> None:
        step, seconds = self.trainer.step, self.trainer.seconds
        click.echo(f"step {step} {seconds:.0f}s lr {self.trainer.settings.rate(step):.2e} {words}")

    def _report(self) -> None:
        found = evaluate(self.trainer, self.tokenizer, self.held_out)
        entropies = " ".join(f"{value:.3f}" for value in found.entropies())
        lowest = min(min(layer) for layer in found.expert_shares)
        self._say(
            f"HELD-OUT {found.nats_per_token:.4f} nats/token {found.bits_per_byte:.4f} bits/byte "
            f"entropy {entropies} least share {lowest:.4f}"
        )


# ---------------------------------------------------------------- what is shipped


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
        "command": shlex.join(["python", "examples/train_tiny_deepseek_v2.py", *sys.argv[1:]]),
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


@click.command()
@click.option("--steps", default=2620, show_default=True, help="Optimizer steps in all.")
@click.option("--threads", default=1, show_default=True, help="Threads that torch may use.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Output of the bible program.")
@click.option("--work", type=click.Path(path_type=Path), default=WORK, show_default=True, help="Saved state.")
@click.option("--every", default=100, show_default=True, help="Steps between saved states.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens of a step.")
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--dropout", default=0.1, show_default=True)
@click.option("--balance", default=0.01, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--rates", default=RATES, show_default=True, help="STEP:SHARE of the learning rate, ...")
@click.option("--vocab-size", default=2048, show_default=True)
@click.option("--seed", default=1611, show_default=True)
def main(
    steps: int,
    threads: int,
    output: Path,
    text: Path | None,
    work: Path,
    every: int,
    vocab_size: int,
    **rest: Any,
) -> None:
    """Train the tiny DeepSeek-V2 and write its checkpoint, tokenizer and model card."""
    keep_memory()
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    ALL_EXPERTS_FUNCTIONS.register("tiny_grouped", grouped_experts)
    ALL_ATTENTION_FUNCTIONS.register("tiny_causal", causal_attention)
    chapters = to_chapters(read_text(text))
    train = [chapter for chapter in chapters if not chapter.held_out]
    tokenizer = train_tokenizer(train, vocab_size)
    trainer = Trainer(make_config(vocab_size), Settings(steps=steps, **rest))
    stream = Stream(tokenizer, train, trainer.settings.seed)
    held_out = [chapter for chapter in chapters if chapter.held_out]
    run = Run(trainer, tokenizer, stream, held_out, work, every)
    click.echo(f"{len(train)} chapters, {len(stream.tokens)} tokens, {len(held_out)} chapters held out")
    if (work / "state.pt").exists():
        trainer.load(work / "state.pt")
        click.echo(f"resumed at step {trainer.step}")
    run.train()
    export(run, output)
    found = write_card(run, output, train)
    click.echo(f"held-out {found.nats_per_token:.4f} nats/token, {found.bits_per_byte:.4f} bits/byte")


if __name__ == "__main__":
    main()
