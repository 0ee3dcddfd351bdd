"""Encoder-decoder models, from checkpoint to tokens, against a reference in float32.

That is transformers, but for NLLB-MoE an independent one: transformers 5.23 runs only two of its experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from moec import runtime
from moec.artifacts.files.traces import load_traces
from moec.errors import RequestError
from moec.planning.routing.analysis import analyse
from tests.end_to_end.conftest import BundleMaker
from tests.support.agreement import RELATIVE, random_ids, relative_error
from tests.support.compiling import compile_checkpoint
from tests.support.encoder_decoder_judge import Judge
from tests.support.nllb_reference import NllbReference, as_transformers_5, published
from tests.support.tiny_models import config_of, save
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS

SOURCE_TOKENS = 60
"""More than 2 * 20 + 1 distances have a bias of their own, and than 6 experts of 9 tokens each take."""
NEW_TOKENS = 16
CANARY = "switch_transformers"
NAMES = [name if name == CANARY else pytest.param(name, marks=pytest.mark.slow) for name in ENCODER_DECODERS]


@pytest.fixture
def pair(name: str, make_bundle: BundleMaker) -> Iterator[tuple[Judge, runtime.Model]]:
    checkpoint, bundle = make_bundle(name)
    with runtime.load(bundle, max_step_tokens=96) as model:
        yield Judge(name, checkpoint), model


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(pair: tuple[Judge, runtime.Model]) -> None:
    judge, model = pair
    (source,) = random_ids(judge.vocab_size, 1, SOURCE_TOKENS).tolist()
    expected = judge.greedy(source, NEW_TOKENS)
    found = model.generate(source, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
    assert found.tolist() == [expected]
    assert len(set(expected)) > 4, "a text of one word would prove little"
    assert relative_error(model.forward(source, expected), judge.logits(source, expected)) < RELATIVE
    # A decoder's prompt is one call too: tokens compete for the capacity of experts.
    (tokens,) = random_ids(judge.vocab_size, 1, 70, seed=1).tolist()
    assert relative_error(model.forward(source, tokens), judge.logits(source, tokens)) < RELATIVE


@pytest.mark.parametrize("name", NAMES)
def test_sources_of_different_lengths_do_not_disturb_each_other(pair: tuple[Judge, runtime.Model]) -> None:
    judge, model = pair
    (ids,) = random_ids(judge.vocab_size, 1, SOURCE_TOKENS, seed=2).tolist()
    sources = [ids, ids[:23], ids[5:6], ids[11:50]]
    expected = [judge.greedy(source, 8) for source in sources]
    found = model.generate(sources, max_new_tokens=8, do_sample=False, eos_token_id=[])
    assert found.tolist() == expected
    padded = np.full((2, SOURCE_TOKENS), 1)
    padded[0], padded[1, :23] = ids, ids[:23]
    mask = np.zeros_like(padded)
    mask[0], mask[1, :23] = 1, 1
    tokens = [judge.start, 7, 9, 7]
    logits = model.forward(padded, [tokens, tokens], attention_mask=mask)
    for row, source in enumerate(sources[:2]):
        assert relative_error(logits[row][None], judge.logits(source, tokens)) < RELATIVE
    assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.total


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_forced_tokens_and_prompts(pair: tuple[Judge, runtime.Model]) -> None:
    judge, model = pair
    (source,) = random_ids(judge.vocab_size, 1, 30, seed=3).tolist()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "max_new_tokens": 6}
    forced = model.generate(source, forced_bos_token_id=77, forced_eos_token_id=5, **options)[0].tolist()
    assert forced == [*judge.greedy(source, 6, forced=77)[:6], 5]
    prompt = judge.greedy(source, 6)[:4]
    continued = model.generate(source, decoder_input_ids=prompt, **options)[0].tolist()
    assert continued[:7] == judge.greedy(source, 6)
    assert continued[:4] == prompt
    with pytest.raises(RequestError, match="decoder_input_ids"):
        model.forward(source)
    with pytest.raises(RequestError, match="one step"):
        model.generate(source * 4, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_sequences_that_lose_their_pages_are_encoded_again(name: str, make_bundle: BundleMaker) -> None:
    _, bundle = make_bundle(name)
    sources = [random_ids(149, length, seed=length).tolist() for length in (40, 33, 64)]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "max_new_tokens": 70}
    with runtime.load(bundle, max_step_tokens=96) as model:
        expected = [model.generate(source, **options)[0].tolist() for source in sources]
    with runtime.load(bundle, max_step_tokens=96, cache_tokens=9 * 32) as model:
        assert model.generate(sources, **options).tolist() == expected
        assert model.stats.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_experts_beyond_the_budget_change_nothing(name: str, make_bundle: BundleMaker) -> None:
    """Experts of encoder and decoder layers alike are read from their files again and again."""
    _, bundle = make_bundle(name)
    (source,) = random_ids(149, 1, SOURCE_TOKENS).tolist()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "max_new_tokens": NEW_TOKENS}
    with runtime.load(bundle, max_step_tokens=96, cache_tokens=320) as model:
        expected = model.generate(source, **options)
        everything = model.memory.total_bytes
        experts = model.memory.expert_bytes
    with runtime.load(
        bundle, max_step_tokens=96, cache_tokens=320, host_memory=everything - experts * 3 // 4
    ) as model:
        np.testing.assert_array_equal(model.generate(source, **options), expected)
        assert model.stats.evictions > 0


@pytest.mark.slow
def test_an_encoders_routing_is_traced_and_experts_are_placed_by_it(make_bundle: BundleMaker) -> None:
    """Against the choices that the reference makes layer by layer: the encoder's first, then the decoder's."""
    checkpoint, bundle = make_bundle("nllb_moe")
    judge = Judge("nllb_moe", checkpoint)
    sources = [random_ids(judge.vocab_size, count, seed=count).tolist() for count in (50, 21)]
    with runtime.load(bundle, max_step_tokens=96) as model:
        traces, record = model.trace(sources), model.record
    chosen: list[list[int]] = []

    def choose(chances: torch.Tensor) -> list[tuple[int, float]]:
        found = published(chances)
        chosen.append(sorted(expert for expert, _ in found))
        return found

    reference = NllbReference(judge.model.state_dict(), judge.model.config, choose)
    of_encoder: list[list[int]] = []
    of_decoder: list[list[int]] = []
    with torch.inference_mode():
        for source in sources:
            chosen.clear()
            reference.logits(source, [judge.start])
            of_encoder += chosen[: len(source)]
            of_decoder += chosen[len(source) :]
    assert traces.encoder is not None
    (encoder,), decoder = traces.encoder.layers, traces.layers
    assert np.sort(encoder.chosen).tolist() == of_encoder
    assert traces.encoder.sequence_starts.tolist() == [0, 50]
    assert traces.encoder.prefill.all()
    assert [np.sort(layer.chosen)[row].tolist() for row in range(2) for layer in decoder] == of_decoder
    profile = analyse(traces, record).profile
    uses = np.bincount(np.array(of_encoder).ravel(), minlength=6)
    assert list(profile.layers[0].order) == np.argsort(-uses, kind="stable").tolist()
    assert profile.provenance == "traced"
    assert len(set(uses.tolist())) > 1, "experts used alike would prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.55])
def test_second_choices_are_dropped_before_first_ones(tmp_path: Path, share: float) -> None:
    """An NLLB whose experts have less room than all tokens of a call, in both sides."""
    folder = save("nllb_moe", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"moe_eval_capacity_token_fraction": share}
    (folder / "config.json").write_text(json.dumps(changed))
    compile_checkpoint(folder, tmp_path / "model.moec", dtype="f32")
    judge = Judge("nllb_moe", folder)
    source, tokens = (random_ids(judge.vocab_size, count, seed=count).tolist() for count in (50, 33))
    expected = judge.logits(source, tokens)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=96) as model:
        assert relative_error(model.forward(source, tokens), expected) < RELATIVE
    judge.model.config.moe_eval_capacity_token_fraction = 1.0
    assert relative_error(judge.logits(source, tokens), expected) > 0.01, "nothing was dropped"


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_what_the_reference_drops_is_what_transformers_router_drops(before: bool) -> None:
    """Its experts are wrong, its router is not: ``route_tokens`` says which weights are left."""
    config = config_of("nllb_moe")
    config.moe_eval_capacity_token_fraction = 0.2
    config.normalize_router_prob_before_dropping = before
    logits = torch.randn(40, config.num_experts, generator=torch.Generator().manual_seed(3))
    router = NllbMoeTop2Router(config).eval()
    _, theirs = router.route_tokens(logits)
    reference = NllbReference({}, config)
    kept = reference._kept([published(chances) for chances in torch.softmax(logits, -1)])
    ours = torch.zeros_like(logits)
    for token, pairs in enumerate(kept):
        for expert, weight in pairs:
            ours[token, expert] = weight
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert ((ours > 0).sum(-1) == 0).any()


@pytest.mark.slow
def test_recorded_routing_of_both_sides_is_kept_from_run_to_run(
    make_bundle: BundleMaker, tmp_path: Path
) -> None:
    _, bundle = make_bundle("switch_transformers")
    sources = [random_ids(149, count, seed=count).tolist() for count in (40, 12)]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "max_new_tokens": 5}
    for source in sources:
        with runtime.load(bundle, max_step_tokens=96, trace_path=tmp_path / "t.npz") as model:
            model.generate(source, **options)
            model.forward(source, [0, 3])
    traces = load_traces(tmp_path / "t.npz")
    assert traces.encoder is not None
    assert traces.encoder.sequence_starts.tolist() == [0, 40]
    assert (traces.encoder.tokens, traces.tokens) == (52, 10)
    assert (len(traces.encoder.layers), len(traces.layers)) == (2, 1)


@pytest.mark.slow
def test_transformers_runs_two_experts_of_nllb(make_bundle: BundleMaker) -> None:
    """The evidence for a reference of our own: with its fault put in, ours agrees with transformers to the last bits.

    ``NllbMoeExperts.forward`` is given the one-hot mask of first choices, whose numbers are 0 and 1, and encodes it
    once more, as if those were experts.
    """
    checkpoint, _ = make_bundle("nllb_moe")
    judge = Judge("nllb_moe", checkpoint)
    source, tokens = (random_ids(judge.vocab_size, count, seed=4).tolist() for count in (25, 12))
    with torch.inference_mode():
        theirs = judge.model(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([tokens])
        ).logits[0]
    state, config = judge.model.state_dict(), judge.model.config
    assert torch.allclose(
        NllbReference(state, config, as_transformers_5).logits(source, tokens), theirs, atol=1e-5
    )
    assert not torch.allclose(NllbReference(state, config).logits(source, tokens), theirs, atol=1e-2)
