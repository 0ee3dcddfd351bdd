"""``/v1/completions``: prompts, texts, stop strings, sampling."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from moec.artifacts.model import GenerationDefaults
from tests.support.asking import SCRIPT, completion, connected, events, refusal, usage
from tests.support.byte_tokenizer import END, bytes_tokenizer
from tests.support.served import CONTEXT, NAME, make_model, served

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from moec.runtime.model import Model


def test_a_completion_is_whole_and_counted(client: httpx.Client) -> None:
    answer = completion(client)
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert answer["choices"] == [{"index": 0, "text": SCRIPT, "logprobs": None, "finish_reason": "stop"}]
    tokens = len(SCRIPT.encode()) + 1
    assert answer["usage"] == usage(2, tokens)


def test_a_stream_never_splits_a_character_and_sums_to_the_answer(client: httpx.Client) -> None:
    chunks = events(
        client,
        "/v1/completions",
        {"prompt": "x=", "max_tokens": 99, "stream_options": {"include_usage": True}},
    )
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert "".join(texts) == SCRIPT
    assert "\ufffd" not in "".join(texts)
    assert len(texts) >= len(SCRIPT)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * len(texts)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(SCRIPT.encode()) + 1


@pytest.mark.parametrize("stop", ["Stop", ["never", " 🙂 St"], "界!"])
def test_stop_strings_end_the_text_before_them(client: httpx.Client, stop: str | list[str]) -> None:
    found = next(each for each in ([stop] if isinstance(stop, str) else stop) if each in SCRIPT)
    text = SCRIPT[: SCRIPT.index(found)]
    answer = completion(client, stop=stop)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len((text + found).encode())
    chunks = events(client, "/v1/completions", {"prompt": "x=", "max_tokens": 99, "stop": stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_prompts_of_all_kinds_and_several_choices(client: httpx.Client) -> None:
    ids = bytes_tokenizer().encode("x=").ids
    for prompt in (ids, [ids, ids], ["x=", "longer x="]):
        answer = completion(client, prompt=prompt, n=2, max_tokens=3, echo=True)
        texts = ["x=", "longer x="] if prompt == ["x=", "longer x="] else ["x="] * (2 if prompt != ids else 1)
        expected = [text + SCRIPT[:2] for text in texts for _ in range(2)]
        # The third token is half of a character.
        assert [choice["text"] for choice in answer["choices"]] == [each + "\ufffd" for each in expected]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["usage"]["prompt_tokens"] == sum(len(text) for text in texts)
        assert answer["usage"]["completion_tokens"] == 3 * len(expected)


def test_eight_at_once_say_what_each_says_alone(client: httpx.Client, twin: Model) -> None:
    prompts = [f"prompt number {n}, of the fake's own words" for n in range(8)]

    def ask(prompt: str) -> Any:
        answer = completion(client, prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True)
        return answer["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, together, strict=True):
        ids = twin.generate(twin.encode(prompt), max_new_tokens=20, do_sample=False, eos_token_id=[])
        assert text == twin.decode(ids[0][len(twin.encode(prompt)) :])


def test_options_of_sampling_reach_the_sampler(client: httpx.Client, twin: Model) -> None:
    prompt = "sampled"
    ids = twin.encode(prompt)
    options: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.2,
        "seed": 5,
    }
    answers = completion(client, prompt=prompt, n=2, max_tokens=12, ignore_eos=True, **options)["choices"]
    rows = twin.generate([ids, ids], max_new_tokens=12, eos_token_id=[], do_sample=True, **options)
    assert [answer["text"] for answer in answers] == [twin.decode(row[len(ids) :]) for row in rows]
    banned = completion(client, max_tokens=1, logit_bias={str(bytes_tokenizer().encode("G").ids[0]): -100})
    assert banned["choices"][0]["text"] != "G"
    assert completion(client, max_tokens=2, stop_token_ids=bytes_tokenizer().encode("r").ids)["choices"][
        0
    ] == {
        "index": 0,
        "text": "G",
        "logprobs": None,
        "finish_reason": "stop",
    }
    end = completion(client, min_tokens=40, max_tokens=40)
    assert end["usage"]["completion_tokens"] == 40


def test_defaults_are_the_checkpoints_and_zero_is_greedy(tmp_path: Path) -> None:
    hot = GenerationDefaults(None, (END,), None, True, 50.0, 0, 1.0, 1.0)
    model = make_model(tmp_path, SCRIPT, hot)
    with served(model) as (url, _), connected(url) as client:
        assert completion(client, temperature=0, max_tokens=1)["choices"][0]["text"] == "G"
        texts = {completion(client, max_tokens=4, seed=n)["choices"][0]["text"] for n in range(3)}
        assert len(texts) == 3


def test_behind_an_encoder_prompts_are_what_it_reads(tmp_path: Path) -> None:
    start, language = bytes_tokenizer().encode("^=").ids
    defaults = GenerationDefaults(None, (END,), None, False, 1.0, 0, 1.0, 1.0, decoder_start_token_id=start)
    model = make_model(tmp_path, "Bonjour", defaults, encoder=True)
    with served(model) as (url, _), connected(url) as client:
        answer = completion(client, prompt="hello, you", forced_bos_token_id=language)
        assert answer["choices"][0]["text"] == "=Bonjour"
        assert answer["usage"] == usage(10, 9)
        texts = [choice["text"] for choice in completion(client, prompt=["one", "two"], n=2)["choices"]]
        own = make_model(tmp_path, "Bonjour", defaults, encoder=True)
        rows = own.generate([own.encode("one"), own.encode("two")], max_new_tokens=99)
        assert texts == [own.decode(row[1:][row[1:] != END]) for row in rows for _ in range(2)]
        long = {"prompt": "x" * (CONTEXT + 1)}
        assert refusal(client, "/v1/completions", long)["code"] == "context_length_exceeded"
        assert refusal(client, "/v1/completions", {"prompt": "x", "echo": True})["param"] == "echo"
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert "does not chat" in refusal(client, "/v1/chat/completions", body)["message"]
