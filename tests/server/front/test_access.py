"""Who is let in: token, Origin, kind of body, over HTTP and WebSocket; and what needs no token."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from running_front import TOKEN, RunningFront
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect


@pytest.fixture(scope="module")
def bare(front: RunningFront) -> httpx.Client:
    return httpx.Client(base_url=front.url)


def test_anybody_may_ask_whether_the_server_is_up(bare: httpx.Client) -> None:
    assert bare.get("/").json()["name"] == "inference-workbench"
    assert bare.get("/health").json()["engine"] == "ready"


@pytest.mark.parametrize("path", ["/info", "/v1/models", "/features", "/requests", "/nothing-here", "/openapi.json"])
def test_everything_else_needs_the_token(bare: httpx.Client, path: str) -> None:
    answer = bare.get(path)
    assert answer.status_code == 401
    assert "token" in answer.json()["error"]["message"]
    assert TOKEN not in answer.text


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"Authorization": f"Bearer {TOKEN}"}, "", 200),
        ({}, f"?token={TOKEN}", 200),
        ({"X-Inference-Workbench-Token": TOKEN}, "", 200),
        ({"X-Inference-Workbench-Token": TOKEN, "Authorization": "token jupyter"}, "?token=jupyter", 200),
        ({"X-Inference-Workbench-Token": "wrong", "Authorization": f"Bearer {TOKEN}"}, "", 401),
        ({"Authorization": "Bearer wrong"}, "", 401),
        ({"Authorization": f"Basic {TOKEN}"}, "", 401),
        ({"Authorization": "Bearer tøken".encode("latin-1")}, "", 401),
    ],
)
def test_the_token_is_taken_from_three_places_and_the_proxys_wins(
    bare: httpx.Client, headers: dict, query: str, status: int
) -> None:
    assert bare.get(f"/info{query}", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("origin", "extra", "status"),
    [
        ("https://evil.example", {}, 403),
        ("null", {}, 403),
        ("http://127.0.0.1:1", {}, 403),
        ("{url}", {}, 200),
        ("https://hub.example", {"X-Forwarded-Host": "hub.example"}, 200),
        ("https://hub.example", {"Host": "hub.example:443"}, 200),
        ("https://hub.example", {"X-Forwarded-Host": "other.example"}, 403),
    ],
)
def test_only_pages_of_this_host_may_use_the_server(front: RunningFront, origin: str, extra: dict, status: int) -> None:
    answer = front.http.get("/info", headers={"Origin": origin.format(url=front.url), **extra})
    assert answer.status_code == status
    if status == 403:
        assert origin in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_body_that_is_not_json_is_refused(front: RunningFront, kind: str) -> None:
    answer = front.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_a_body_beyond_all_measure_is_refused(front: RunningFront) -> None:
    def endless():
        for _ in range(40):
            yield b" " * (1 << 20)

    answer = front.http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_an_unknown_path_or_method_is_said_in_the_same_shape(front: RunningFront) -> None:
    assert "/nothing" in front.http.get("/nothing").json()["error"]["message"]
    wrong = front.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert "GET" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [("", {}, 401), ("?token=wrong", {}, 401), (f"?token={TOKEN}", {"Origin": "https://evil.example"}, 403)],
)
def test_the_telemetry_socket_is_guarded_the_same_way(
    front: RunningFront, query: str, headers: dict, status: int
) -> None:
    address = front.url.replace("http", "ws") + "/telemetry" + query
    with pytest.raises(InvalidStatus) as refusal:
        connect(address, additional_headers=headers).close()
    assert refusal.value.response.status_code == status
    assert b"error" in refusal.value.response.body


def test_the_token_is_in_no_log(front: RunningFront) -> None:
    front.http.get("/info", params={"token": TOKEN})
    said = [line for line in front.log.read_text().splitlines() if TOKEN in line]
    assert said == [f"    {front.url}/?token={TOKEN}"]  # the address that is shown to the person who started it
    assert TOKEN not in front.engine_output()


def test_a_page_of_an_allowed_origin_passes_the_browsers_preflight(
    scripted: Callable[..., RunningFront],
) -> None:
    front = scripted(options=("--allow-origin", "https://lab.example"))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with httpx.Client(base_url=front.url) as page:
        allowed = page.options("/v1/completions", headers={"Origin": "https://lab.example", **asked})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
        refused = page.options("/v1/completions", headers={"Origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in refused.headers
    assert front.http.get("/info", headers={"Origin": "https://lab.example"}).status_code == 200
    assert front.http.get("/info", headers={"Origin": "https://evil.example"}).status_code == 403
