"""The path from an authenticated Jupyter client to the front, through a real Jupyter server, seen from both ends."""

import itertools
import json
import time

import httpx
import openai
import pytest
from servers_under_test import TOKEN, running_jupyter
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect


@pytest.fixture(scope="module", params=["/", "/user/ann%40lab/"], ids=["root", "hub-like base_url"])
def jupyter(request, tmp_path_factory):
    with running_jupyter(tmp_path_factory.mktemp("j"), "echo_extension", base_url=request.param) as server:
        yield server


@pytest.fixture
def client(jupyter):
    with httpx.Client(base_url=jupyter.workbench, headers=jupyter.headers, timeout=30) as client:
        yield client


def test_the_unmodified_openai_client_gets_each_token_when_it_is_made(jupyter):
    client = openai.OpenAI(base_url=f"{jupyter.workbench}v1", api_key=TOKEN)
    stream = client.chat.completions.create(model="echo", messages=[], max_tokens=8, stream=True)
    arrivals = [time.monotonic() for _ in stream]
    assert len(arrivals) == 8
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    # The front makes one every 100 ms. In one lump, every gap would be about zero.
    assert min(gaps) > 0.04, gaps


def test_an_error_of_the_front_keeps_its_status_and_words_in_a_streamed_request(client):
    answer = client.post("v1/completions", json={"stream": True, "max_tokens": 0})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "max_tokens must be at least 1"


def test_the_front_sees_its_own_token_and_none_of_jupyters_credentials(client):
    client.cookies.set("secret", "cookie")
    seen = client.get(f"echo?a=1&token={TOKEN}&b=%2F").json()
    assert seen["token_matches"]
    assert seen["query"] == "a=1&b=%2F"
    assert not {"authorization", "cookie", "origin", "x-xsrftoken"} & set(seen["headers"])
    assert TOKEN not in json.dumps(seen)


def test_a_patch_arrives_with_its_body(client):
    seen = client.patch("echo", json={"kv_cache": False}).json()
    assert (seen["method"], seen["body"]) == ("PATCH", '{"kv_cache":false}')


def test_a_client_that_leaves_ends_its_request_at_the_front(client):
    before = client.get("left").json()["left"]
    with client.stream("POST", "v1/completions", json={"stream": True, "max_tokens": 600}) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 5
    while client.get("left").json()["left"] == before:
        assert time.monotonic() < deadline, "the front still generates for a client that has left"
        time.sleep(0.05)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_user_is_told_so_with_401(jupyter, method):
    answer = httpx.request(method, f"{jupyter.workbench}echo", headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert "Jupyter" in answer.json()["error"]["message"]


def test_a_page_of_another_origin_is_refused_even_with_the_token(jupyter, client):
    answer = client.post("echo", json={}, headers={"Origin": "https://elsewhere.example"})
    assert answer.status_code == 403
    assert "elsewhere.example" in answer.json()["error"]["message"]
    own = jupyter.url.split("/")[2]
    assert client.post("echo", json={}, headers={"Origin": f"http://{own}"}).status_code == 200


def test_a_browser_cookie_alone_cannot_post_without_the_xsrf_token(jupyter):
    with httpx.Client() as browser:
        browser.get(f"{jupyter.url}tree?token={TOKEN}")  # logs in: sets the login and XSRF cookies
        assert browser.get(f"{jupyter.workbench}echo").status_code == 200
        assert browser.post(f"{jupyter.workbench}echo", json={}).status_code == 403
        xsrf = browser.cookies.get("_xsrf")
        assert browser.post(f"{jupyter.workbench}echo", json={}, headers={"X-XSRFToken": xsrf}).status_code == 200


def socket_url(jupyter):
    return jupyter.workbench.replace("http", "ws", 1) + "telemetry"


def test_the_websocket_carries_the_fronts_token_and_whole_binary_messages(jupyter):
    with connect(f"{socket_url(jupyter)}?token={TOKEN}") as socket:
        seen = json.loads(socket.recv())
        assert seen["x-inference-workbench-token"]
        assert TOKEN not in json.dumps(seen)
        socket.send(b"x" * 1_000_000)
        assert socket.recv() == b"x" * 1_000_000
    assert TOKEN not in jupyter.log.read_text().partition("inference-workbench/telemetry")[2]


def test_the_websocket_refuses_strangers_and_foreign_pages(jupyter):
    with pytest.raises(InvalidStatus) as stranger:
        connect(socket_url(jupyter))
    assert stranger.value.response.status_code in {401, 403}
    with pytest.raises(InvalidStatus) as foreign:
        connect(f"{socket_url(jupyter)}?token={TOKEN}", origin="https://elsewhere.example")
    assert foreign.value.response.status_code == 403


@pytest.mark.parametrize("status", [0, 1])
def test_a_front_that_died_is_started_again_by_the_next_request(client, status):
    first = client.get("health").json()["pid"]
    answer = client.post("exit", json={"status": status})
    assert answer.status_code == 502
    assert "started anew" in answer.json()["error"]["message"]
    assert client.get("health").json()["pid"] != first


@pytest.mark.parametrize(
    ("how", "words"),
    [("ECHO_FRONT_FAILS", "inference-workbench[server]"), ("ECHO_FRONT_MISSING", "no_such_package_at_all")],
)
def test_a_front_that_cannot_start_says_why_at_once(tmp_path, how, words):
    with running_jupyter(tmp_path, "echo_extension", **{how: "1"}) as jupyter:
        begin = time.monotonic()
        answer = httpx.get(f"{jupyter.workbench}health", headers=jupyter.headers, timeout=30)
        assert answer.status_code == 503
        assert words in answer.json()["error"]["message"]
        assert time.monotonic() - begin < 10
