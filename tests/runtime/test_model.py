from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moec.artifacts.model import GenerationDefaults
from moec.errors import RequestError
from moec.runtime.engine import Engine, Limits
from moec.runtime.memory.budget import MemoryPlan
from moec.runtime.model import Model
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.stats import Stats
from tests.support import fake_chain
from tests.support.fake_executor import FakeExecutor

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB = 31


def make_model(defaults: GenerationDefaults = fake_chain.DEFAULTS, pages: int = 32) -> Model:
    import dataclasses

    record = dataclasses.replace(fake_chain.record(), vocab_size=VOCAB, generation=defaults)
    engine = Engine(FakeExecutor(pages, VOCAB), Limits(3, 64, 256, pages), Vocabulary(VOCAB), Stats())
    return Model(Path("nowhere"), record, "cpu", MemoryPlan(0, 0, pages, 0, 0, 0, 0, 0), engine, None)


def greedy(prompt: list[int], count: int) -> list[int]:
    fake, tokens = FakeExecutor(1, VOCAB), list(prompt)
    for _ in range(count):
        tokens.append(int(fake.logits(tuple(tokens)).argmax()))
    return tokens[len(prompt) :]


def test_one_prompt_is_returned_with_its_continuation() -> None:
    output = make_model().generate([1, 2, 3], max_new_tokens=5)
    assert output.dtype == np.int64
    assert output.tolist() == [[1, 2, 3, *greedy([1, 2, 3], 5)]]


def test_prompts_of_different_lengths_are_padded_left_and_ended_ones_right() -> None:
    long, short = [4, 5, 6, 7], [9]
    end = greedy(short, 3)[2]
    assert end not in greedy(long, 6)
    assert greedy(short, 3).index(end) == 2
    output = make_model().generate([long, short], max_new_tokens=6, eos_token_id=end, pad_token_id=30)
    expected = [[*long, *greedy(long, 6)], [30, 30, 30, *short, *greedy(short, 3), 30, 30, 30]]
    assert output.tolist() == expected


def test_padding_defaults_to_the_models_pad_token_then_its_end_token() -> None:
    own = GenerationDefaults(None, (8, 9), 7, False, 1.0, 0, 1.0, 1.0)
    without = GenerationDefaults(None, (8, 9), None, False, 1.0, 0, 1.0, 1.0)
    for defaults, pad in ((own, 7), (without, 8)):
        assert make_model(defaults).generate([[1, 2], [3]], max_new_tokens=1)[1, 0] == pad


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]]])
def test_a_padded_array_with_a_mask_keeps_its_rows(mask: list[list[int]]) -> None:
    ids = np.array([[4, 5, 4, 5], [1, 2, 3, 4]])
    output = make_model().generate(ids, np.array(mask), max_new_tokens=3)
    assert output.tolist() == [[4, 5, 4, 5, *greedy([4, 5], 3)], [1, 2, 3, 4, *greedy([1, 2, 3, 4], 3)]]


def test_masks_of_any_numbers_and_of_rows_of_different_lengths() -> None:
    mask: Any = [[1.0, 1.0], [1.0]]
    output = make_model().generate([[4, 5], [9]], mask, max_new_tokens=2, pad_token_id=30)
    assert output.tolist() == [[4, 5, *greedy([4, 5], 2)], [30, 9, *greedy([9], 2)]]


def test_numbers_of_numpy_are_numbers() -> None:
    options: dict[str, Any] = {"do_sample": np.True_, "temperature": np.float32(2.0), "top_k": np.int32(9)}
    drawn = make_model().generate([1, 2], max_new_tokens=np.int64(8), seed=np.uint8(5), **options)  # type: ignore[arg-type]
    assert drawn.tolist() == make_model().generate([1, 2], max_new_tokens=8, seed=5, **options).tolist()


def test_threads_take_turns() -> None:
    model = make_model()
    prompts = [[n, n + 1] for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda prompt: model.generate(prompt, max_new_tokens=20), prompts))
    assert [output[0, 2:].tolist() for output in outputs] == [greedy(prompt, 20) for prompt in prompts]


def test_counters_are_not_brought_up_to_date_in_the_middle_of_another_threads_call() -> None:
    """Where a GPU has them, looking takes its stream and its memory for copies."""
    model, looks = make_model(), list[str]()
    model._executor = SimpleNamespace(count=lambda: looks.append("counted"), close=lambda: None)  # type: ignore[assignment]

    class Looking:
        def put(self, value: NDArray[Any]) -> None:
            del value
            with ThreadPoolExecutor(1) as other:
                assert other.submit(lambda: model.stats).result() is model.stats

        def end(self) -> None:
            looks.append("end")

    model.generate([1, 2], max_new_tokens=2, streamer=Looking())
    assert looks == [*["counted"] * 3, "end"], "by the thread that has the turn"
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: model.stats).result()
    assert looks[-1] == "counted"


def test_a_forked_process_is_told_to_load_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        with pytest.raises(RequestError, match="another process"):
            model.generate([1], max_new_tokens=1)
        model.close()
    assert model.generate([1], max_new_tokens=1).shape == (1, 2), "the fork's close is none of this one's"


def test_more_prompts_than_the_batch_all_finish() -> None:
    prompts = [[n] * (n + 1) for n in range(10)]
    output = make_model().generate(prompts, max_new_tokens=4)
    assert output[:, -4:].tolist() == [greedy(prompt, 4) for prompt in prompts]


def test_row_i_equals_a_run_alone_with_seed_plus_i() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "top_k": 9}
    batch = make_model().generate([[1, 2], [3, 4]], seed=5, **options)
    alone = make_model().generate([3, 4], seed=6, **options)
    assert batch[1].tolist() == alone[0].tolist()


def test_defaults_come_from_the_model_and_arguments_override_them() -> None:
    defaults = GenerationDefaults(None, (greedy([1], 2)[1],), None, True, 1e-4, 0, 1.0, 1.0)
    model = make_model(defaults)
    assert model.generate([1], max_new_tokens=5).tolist() == [[1, *greedy([1], 2)]]
    assert model.generate([1], max_new_tokens=5, eos_token_id=[]).tolist() == [[1, *greedy([1], 5)]]
    hot = [
        model.generate([1], max_new_tokens=9, temperature=9.0, eos_token_id=[], seed=n)[0] for n in range(2)
    ]
    assert hot[0].tolist() != hot[1].tolist()


def test_without_max_new_tokens_the_context_is_filled() -> None:
    assert make_model().generate([1, 2]).shape == (1, 256)
    assert make_model(pages=2).generate([1, 2]).shape == (1, 65)


def test_min_new_tokens_holds_the_end_back() -> None:
    end = greedy([1], 1)[0]
    assert make_model().generate([1], max_new_tokens=9, eos_token_id=end).shape == (1, 2)
    assert make_model().generate([1], max_new_tokens=9, min_new_tokens=4, eos_token_id=end).shape[1] >= 5


class Collector:
    def __init__(self) -> None:
        self.values: list[NDArray[Any]] = []
        self.ended = 0

    def put(self, value: NDArray[Any]) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_each_token() -> None:
    collector = Collector()
    output = make_model().generate([1, 2], max_new_tokens=3, streamer=collector)
    assert [value.shape for value in collector.values] == [(1, 2), (1,), (1,), (1,)]
    assert [token for value in collector.values for token in value.ravel().tolist()] == output[0].tolist()
    assert collector.ended == 1


def test_transformers_own_streamers_work() -> None:
    from transformers.generation.streamers import BaseStreamer, TextStreamer

    class Letters:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(chr(97 + token) for token in ids) + "\n"

    texts: list[str] = []

    class Keep(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            texts.append(text)

    streamer: BaseStreamer = Keep(Letters(), skip_prompt=True)
    output = make_model().generate([1, 2], max_new_tokens=3, streamer=streamer)
    assert "".join(texts).replace("\n", "") == "".join(chr(97 + token) for token in output[0, 2:])


def test_a_failing_streamer_leaves_no_sequence_behind() -> None:
    class Failing(Collector):
        def put(self, value: NDArray[Any]) -> None:
            super().put(value)
            if len(self.values) == 3:
                raise RuntimeError("full")

    model = make_model()
    with pytest.raises(RuntimeError, match="full"):
        model.generate([1, 2], max_new_tokens=50, streamer=Failing())
    assert not model.engine.busy
    assert model.generate([1], max_new_tokens=2).tolist() == [[1, *greedy([1], 2)]]


def test_forward_gives_logits_of_every_row_and_position() -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    logits = make_model().forward(np.array(rows))
    assert logits.shape == (2, 3, VOCAB)
    assert logits.dtype == np.float32
    fake = FakeExecutor(1, VOCAB)
    np.testing.assert_array_equal(logits[1, 2], fake.logits((4, 5, 6)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"do_sample": True, "temperature": 0}, "temperature=0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature=nan"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature=inf"),
        ({"do_sample": True, "top_p": 0.0}, "top_p=0.0"),
        ({"do_sample": True, "top_p": 1.1}, "top_p=1.1"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1"),
        ({"do_sample": True, "temperature": 1e-40}, "temperature=1e-40"),
        ({"do_sample": "false"}, "do_sample='false'"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e"),
        ({"eos_token_id": -5}, "eos_token_id=-5"),
        ({"eos_token_id": 1.5}, "eos_token_id=1.5"),
        ({"pad_token_id": "x"}, "pad_token_id='x'"),
        ({"pad_token_id": 10**20}, "pad_token_id=1"),
        ({"forced_bos_token_id": [1]}, r"forced_bos_token_id=\[1\]"),
        ({"forced_eos_token_id": 2.0}, "forced_eos_token_id=2.0"),
        ({"forced_eos_token_id": VOCAB}, "Token id 31 is out of range"),
        ({"streamer": 5}, "no streamer"),
        ({"stop_strings": [""]}, "stop_strings has ''"),
        ({"stop_strings": [5]}, "stop_strings has 5"),
        ({"stop_strings": 5}, "stop_strings has 5"),
        ({"stop_strings": np.array(5)}, "stop_strings has array"),
        ({"seed": -1}, "seed=-1"),
        ({"max_new_tokens": 300}, "context of 256"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], why: str) -> None:
    model = make_model()
    with pytest.raises(RequestError, match=why):
        model.generate([1, 2], **options)
    assert not model.engine.busy


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([], None),
        ([[]], None),
        ([[1], []], None),
        ([31], None),
        ([[1], [-1]], None),
        ("text", None),
        ([1.5], None),
        ([[1, "a"]], None),
        ([True, False], None),
        ([1, 2], [1, 0.5]),
        ([1, 2], "11"),
        (3, None),
        (np.ones((1, 2, 2), np.int64), None),
        (np.array([[1, 2, 3]]), [[1, 0, 1]]),
        (np.array([[1, 2, 3]]), [[1, 1]]),
        (np.array([[1, 2, 3]]), [[0, 0, 0]]),
    ],
)
def test_prompts_that_are_none_are_refused(ids: Any, mask: Any) -> None:
    model = make_model()
    with pytest.raises(RequestError):
        model.generate(ids, mask, max_new_tokens=2)
    assert not model.engine.busy


def test_a_streamer_needs_exactly_one_prompt_and_forward_equal_lengths() -> None:
    with pytest.raises(RequestError, match="one prompt"):
        make_model().generate([[1], [2]], max_new_tokens=1, streamer=Collector())
    with pytest.raises(RequestError, match="one length"):
        make_model().forward([[1, 2], [3]])


def test_unknown_options_are_type_errors() -> None:
    with pytest.raises(TypeError):
        make_model().generate([1], num_beams=2)  # type: ignore[call-arg]


def test_a_closed_model_says_so() -> None:
    with make_model() as model:
        model.generate([1], max_new_tokens=1)
    with pytest.raises(RequestError, match="closed"):
        model.generate([1], max_new_tokens=1)
    assert model.stats.generated_tokens == 1
