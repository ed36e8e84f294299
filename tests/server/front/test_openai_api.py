"""The OpenAI API, asked by the unmodified client over TCP, answered by the real engine."""

from __future__ import annotations

import asyncio
import threading

import httpx
import openai
import pytest
from running_front import TOKEN, RunningFront

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


def test_a_streamed_completion_is_the_whole_one_in_pieces(front: RunningFront) -> None:
    asked = {"model": "tiny-llama", "prompt": "The quick brown", "max_tokens": 24, "temperature": 0}
    whole = front.client.completions.create(**asked)
    chunks = list(front.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    assert whole.usage.prompt_tokens + 24 == whole.usage.total_tokens


def test_tokens_arrive_one_by_one_while_the_answer_is_made(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny-llama", prompt="Once", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert len(front.active()) == 1
    assert front.active()[0]["output_tokens"] < 300
    stream.close()
    front.wait_until_idle()


def test_a_streamed_chat_is_the_whole_one_in_pieces(front: RunningFront) -> None:
    asked = {"model": "tiny-llama", "messages": CHAT, "max_tokens": 16, "temperature": 0}
    whole = front.client.chat.completions.create(**asked)
    chunks = list(front.client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.choices[0].message.content


def test_several_samples_of_several_prompts_come_back_in_order(front: RunningFront) -> None:
    answer = front.client.completions.create(
        model="tiny-llama",
        prompt=[[8, 9], [5, 6, 7]],
        n=2,
        max_tokens=4,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert answer.usage.completion_tokens == 16


def test_logprobs_have_the_shape_that_each_endpoint_promises(front: RunningFront) -> None:
    chat = front.client.chat.completions.create(
        model="tiny-llama", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(max(one.logprob for one in token.top_logprobs))
        assert bytes(token.bytes).decode(errors="replace") == token.token
    plain = front.client.completions.create(
        model="tiny-llama", prompt="The", max_tokens=4, temperature=0, logprobs=2, stream=False
    )
    logprobs = plain.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 4
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)


def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_engine(front: RunningFront) -> None:
    asked = {"model": "tiny-llama", "prompt": "The quick brown", "temperature": 0}
    free = front.client.completions.create(**asked, max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    for stream in (False, True):
        answer = front.client.completions.create(
            **asked, max_tokens=2000, stop=[stop], stream=stream, extra_body={"ignore_eos": True}
        )
        if stream:
            chunks = list(answer)
            text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert text == free[: free.index(stop)]
        assert reason == "stop"
    front.wait_until_idle()


def test_without_a_limit_a_text_may_fill_the_rest_of_the_context(front: RunningFront) -> None:
    prompt = [5] * 2040
    answer = front.client.completions.create(model="tiny-llama", prompt=prompt, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"prompt": ', 422, ["not valid JSON"]),
        (b"[1, 2]", 422, ["object"]),
        (b"{}", 422, ["prompt"]),
        ({"prompt": 3}, 422, ["prompt"]),
        ({"prompt": ["a", 3]}, 422, ["list of texts"]),
        ({"prompt": "a", "temperature": "hot"}, 422, ["temperature", "number"]),
        ({"prompt": "a", "temperature": -1}, 422, ["temperature", "greater"]),
        ({"prompt": "a", "max_tokens": 0}, 422, ["max_tokens"]),
        ({"prompt": "a", "max_tokens": "5"}, 422, ["max_tokens"]),
        ({"prompt": "a", "n": 1000}, 422, ["'n'"]),
        ({"prompt": "a", "stop": [""]}, 422, ["stop"]),
        ({"prompt": "a", "request_id": "no spaces"}, 422, ["request_id"]),
        ({"prompt": []}, 422, ["prompt"]),
        ({"prompt": ""}, 400, ["no tokens"]),
        ({"prompt": [400]}, 400, ["400", "384"]),
        ({"prompt": "a", "echo": True}, 400, ["echo", "not supported"]),
        ({"prompt": "a", "best_of": 3}, 400, ["best_of"]),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, ["logit_bias"]),
        ({"prompt": "a", "model": "gpt-4"}, 404, ["gpt-4", "tiny-llama"]),
        ({"prompt": [5] * 2048}, 400, ["2,048 tokens", "2,048"]),
        ({"prompt": [5] * 2000, "max_tokens": 100}, 400, ["2,000", "100", "2,048", "48"]),
    ],
)
def test_a_wrong_completion_request_is_told_what_is_wrong(
    front: RunningFront, body: dict | bytes, status: int, words: list[str]
) -> None:
    sent = (
        {"content": body, "headers": {"Content-Type": "application/json"}}
        if isinstance(body, bytes)
        else {"json": body}
    )
    answer = front.http.post("/v1/completions", **sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("extra", "status", "param"),
    [
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"content": "no role"}]}, 422, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
        ({"top_logprobs": 3}, 422, "top_logprobs"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, 422, "response_format"),
    ],
)
def test_a_wrong_chat_request_names_the_field(front: RunningFront, extra: dict, status: int, param: str) -> None:
    answer = front.http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1} | extra)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_fields_that_change_nothing_are_tolerated(front: RunningFront) -> None:
    extra = {"user": "me", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "unknown_field": 1}
    extra |= {"tool_choice": "auto", "chat_template_kwargs": {"messages": [], "tools": 1, "self": 2}}
    answer = front.http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1} | extra)
    assert answer.status_code == 200, answer.text


def test_refusals_leave_a_running_stream_alone(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny-llama", prompt="Once", max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(iter(stream)).choices[0].text]
    for _ in range(5):
        bare = httpx.Client(base_url=front.url)
        assert bare.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        assert front.http.get("/info", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert (
            front.http.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"}).status_code == 415
        )
        assert front.http.get("/info", headers={"Origin": "https://evil.example"}).status_code == 403
        assert front.http.post("/v1/completions", json={"prompt": 1}).status_code == 422
        with pytest.raises(openai.AuthenticationError, match="not this server's"):
            openai.OpenAI(base_url=f"{front.url}/v1", api_key="wrong", max_retries=0).models.list()
    pieces += [chunk.choices[0].text for chunk in stream]
    again = front.client.completions.create(
        model="tiny-llama", prompt="Once", max_tokens=400, temperature=0, extra_body={"ignore_eos": True}
    )
    assert "".join(pieces) == again.choices[0].text
    assert again.usage.completion_tokens == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(front: RunningFront, stream: bool) -> None:
    body = {
        "prompt": "Once",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": stream,
        "request_id": f"leaver-{stream}",
    }

    def ask() -> None:
        with httpx.Client(base_url=front.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=0.4) as client:
            try:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    for _ in answer.iter_raw():
                        return
            except httpx.ReadTimeout:
                pass

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    front.wait_until_idle()
    last = next(r for r in front.http.get("/requests").json()["requests"] if r["id"] == f"leaver-{stream}")
    assert last["state"] == "cancelled"
    assert last["output_tokens"] < 2000


def test_a_request_can_be_cancelled_by_its_id(front: RunningFront) -> None:
    stream = front.client.completions.create(
        model="tiny-llama",
        prompt="Once",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True, "request_id": "mine"},
    )
    next(iter(stream))
    assert stream.response.headers["x-request-id"] == "mine"
    cancelled = front.http.post("/requests/mine/cancel")
    assert (cancelled.status_code, len(cancelled.json()["cancelled"])) == (200, 1)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "cancelled"


@pytest.mark.parametrize("choices", [1, 2])
def test_stopping_a_request_that_just_ended_changes_nothing_and_an_unknown_one_is_an_error(
    front: RunningFront, choices: int
) -> None:
    front.client.completions.create(
        model="tiny-llama",
        prompt="Once",
        max_tokens=2,
        n=choices,
        extra_body={"request_id": f"over-{choices}"},
    )
    late = front.http.post(f"/requests/over-{choices}/cancel")
    assert (late.status_code, late.json()) == (200, {"cancelled": []})
    ended = [r for r in front.http.get("/requests").json()["requests"] if r["id"].startswith(f"over-{choices}")]
    assert {r["finish_reason"] for r in ended} <= {"length", "stop"}
    unknown = front.http.post("/requests/never-asked/cancel")
    assert unknown.status_code == 404
    assert "never-asked" in unknown.json()["error"]["message"]


async def test_many_streams_at_once_each_get_their_own_answer(front: RunningFront) -> None:
    async def ask(number: int) -> tuple[str, int]:
        client = front.async_client
        stream = await client.completions.create(
            model="tiny-llama",
            prompt=[5 + number % 8],
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, tokens = "", 0
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            tokens = chunk.usage.completion_tokens if chunk.usage else 0
        return text, tokens

    answers = await asyncio.gather(*(ask(number) for number in range(32)))
    assert {tokens for _, tokens in answers} == {20}
    for number in range(32):
        assert answers[number][0] == answers[number % 8][0]
    assert len({text for text, _ in answers}) == 8


def test_the_kv_cache_is_switched_while_a_text_is_being_written(front: RunningFront) -> None:
    asked = {"model": "tiny-llama", "prompt": "The quick", "max_tokens": 120, "temperature": 0}
    expected = front.client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    stream = front.client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].text
        if number in {20, 60}:
            switched = front.http.patch("/features", json={"kv_cache": number == 60}).json()
            assert switched["changed"] == ["kv_cache"]
            assert switched["values"]["kv_cache"] is (number == 60)
    assert text == expected
    refused = front.http.patch("/features", json={"kv_cache": "maybe"})
    assert refused.status_code == 422
    assert "kv_cache" in refused.json()["error"]["message"]
    assert front.http.get("/features").json()["values"]["kv_cache"] is True


def test_token_ids_come_with_the_pieces_and_with_the_whole(front: RunningFront) -> None:
    asked = {"model": "tiny-llama", "max_tokens": 12, "temperature": 0}
    more = {"ignore_eos": True, "return_token_ids": True}
    whole = front.client.completions.create(**asked, prompt="The quick", extra_body=more)
    ids = whole.choices[0].model_extra["token_ids"]
    assert len(ids) == 12
    text = front.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == whole.choices[0].text
    stream = front.client.completions.create(**asked, prompt="The quick", stream=True, extra_body=more)
    pieces = [chunk.choices[0].model_extra["token_ids"] for chunk in stream]
    assert [one for piece in pieces for one in piece] == ids
    assert all(len(piece) == 1 for piece in pieces), "each token when it is made, with or without text"
    chat = front.client.chat.completions.create(**asked, messages=CHAT, extra_body=more)
    assert len(chat.choices[0].model_extra["token_ids"]) == 12


def test_logprobs_can_be_spelled_by_id(front: RunningFront) -> None:
    answer = front.client.completions.create(
        model="tiny-llama",
        prompt="The",
        max_tokens=3,
        temperature=0,
        logprobs=3,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{number}" for number in choice.model_extra["token_ids"]]
    for chosen, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert max(top, key=top.get) == chosen


def test_texts_and_conversations_are_tokenized_as_a_request_would_be(front: RunningFront) -> None:
    def ids(**body: object) -> list[int]:
        answer = front.http.post("/tokenize", json=body).json()
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 2048
        return answer["tokens"]

    asked = {"max_tokens": 8, "temperature": 0}
    by_text = front.http.post("/v1/completions", json={"prompt": "The quick", **asked}).json()
    by_ids = front.http.post("/v1/completions", json={"prompt": ids(prompt="The quick"), **asked}).json()
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]
    assert by_text["usage"] == by_ids["usage"]
    chat = front.http.post("/v1/chat/completions", json={"messages": CHAT, **asked}).json()
    as_ids = front.http.post("/v1/completions", json={"prompt": ids(messages=CHAT), **asked}).json()
    assert as_ids["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert as_ids["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    for wrong in ({}, {"prompt": "a", "messages": CHAT}):
        refused = front.http.post("/tokenize", json=wrong)
        assert refused.status_code == 422
        assert "one of 'prompt'" in refused.json()["error"]["message"]


def test_emptied_caches_supply_nothing_and_running_requests_go_on(front: RunningFront) -> None:
    def cached() -> int:
        body = {"prompt": list(range(10, 110)), "max_tokens": 4, "temperature": 0}
        usage = front.http.post("/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() >= 90
    stream = front.client.completions.create(
        model="tiny-llama", prompt="Once", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    next(pieces)
    forgotten = front.http.post("/reset_prefix_cache", json={}).json()
    assert forgotten["blocks"] > 0
    assert sum(1 for _ in pieces) >= 100
    assert cached() == 0
