"""Keys, origins of other pages, the root path behind a proxy, and the port."""

import base64
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gradio_client import Client
from openai import AuthenticationError, OpenAI

from nextgpt import demo_app
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.demo_app import KEY_VARIABLE
from nextgpt.serving import server
from nextgpt.serving.access import Access, listen
from serving_harness import MODEL, Running, free_port, running_server, scripted_assistant, user

KEYS = ("first-key", "second-key")
FRIEND, STRANGER = "https://chat.example", "https://evil.example"
ASKED = {"messages": [user("a")]}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, one friendly origin and a root path."""
    assistant = scripted_assistant(tmp_path_factory.mktemp("guarded"), ("Sure", "image"))
    access = Access(KEYS, (FRIEND,), "/nextgpt")
    with running_server(assistant, access) as running:
        yield running


def bearer(key: str = KEYS[0]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"ada:{password}".encode()).decode()}


@pytest.mark.parametrize("path", [
    "/", "/config", "/metrics", "/v1/models", "/nextgpt/v1/models", "/nextgpt/", "/gradio_api/info",
    "/v1/videos/video_x/content", "/healthy", "/health/../metrics", "/v1/files/../models",
])  # fmt: skip
@pytest.mark.parametrize("headers", [
    {}, bearer("third-key"), basic("third-key"), {"Authorization": "Bearer"},
    {"Authorization": "Basic %%"}, {"Authorization": f"Token {KEYS[0]}"}, basic("")
])  # fmt: skip
def test_request_without_a_key_is_refused(guarded: Running, path: str, headers: dict) -> None:
    reply = httpx.get(httpx.URL(guarded.address, raw_path=path.encode()), headers=headers)
    assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    scheme = "Bearer" if path.removeprefix("/nextgpt").startswith("/v1/") else "Basic"
    assert reply.headers["www-authenticate"].startswith(scheme)


@pytest.mark.parametrize("headers", [bearer(KEYS[0]), bearer(KEYS[1]), basic(KEYS[1])])
def test_every_key_opens_the_api_and_the_page(guarded: Running, headers: dict) -> None:
    for path in ("/", "/v1/models", "/metrics"):
        assert httpx.get(guarded.address + path, headers=headers).status_code == 200


def test_health_needs_no_key(guarded: Running) -> None:
    assert httpx.get(f"{guarded.address}/health").json()["status"] == "ok"
    assert httpx.get(f"{guarded.address}/nextgpt/health").json()["status"] == "ok"


def test_clients_send_their_key(guarded: Running) -> None:
    stranger = OpenAI(base_url=f"{guarded.address}/v1", api_key="none", max_retries=0)
    with pytest.raises(AuthenticationError, match="a valid key is missing"):
        stranger.models.list()
    with OpenAI(base_url=f"{guarded.address}/v1", api_key=KEYS[1]) as friend:
        assert [model.id for model in friend.models.list()] == [MODEL]
    page = Client(f"{guarded.address}/nextgpt/", headers=bearer(), verbose=False)
    answer = page.predict("a", [], {}, api_name="/chat")
    assert answer["text"] == "Sure"


def test_videos_are_listed_by_key(guarded: Running) -> None:
    address = f"{guarded.address}/v1/videos"
    order = httpx.post(address, json={"prompt": "a"}, headers=bearer()).json()
    listed = {key: httpx.get(address, headers=bearer(key)).json()["data"] for key in KEYS}
    assert [[one["id"] for one in listed[key]] for key in KEYS] == [[order["id"]], []]


def test_server_without_keys_is_open(demo: Running) -> None:
    for headers in ({}, bearer("anything")):
        assert httpx.get(f"{demo.address}/v1/models", headers=headers).is_success


@pytest.mark.parametrize("prefix", ["", "/nextgpt"])
def test_root_path_works_whether_the_proxy_removes_it_or_not(guarded: Running, prefix: str) -> None:
    with httpx.Client(base_url=guarded.address + prefix, headers=bearer(), timeout=60) as proxy:
        assert proxy.get("/config").json()["root"] == f"{guarded.address}/nextgpt"
        assert proxy.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert proxy.get("/").status_code == 200
        assert proxy.get("/docs").status_code == 404
        image = proxy.post("/v1/images/generations", json={"prompt": "a", "response_format": "url"})
        (made,) = image.json()["data"]
        assert made["url"].startswith(f"{guarded.address}/nextgpt/v1/files/")
        assert httpx.get(made["url"]).content.startswith(b"\x89PNG")  # no key: an <img> has none


def test_forwarded_host_is_in_the_urls_of_media(guarded: Running) -> None:
    headers = bearer() | {"X-Forwarded-Proto": "https"}
    body = {"prompt": "a", "response_format": "url"}
    reply = httpx.post(f"{guarded.address}/v1/images/generations", json=body, headers=headers)
    assert reply.json()["data"][0]["url"].startswith("https://127.0.0.1")


def preflight(running: Running, origin: str) -> httpx.Response:
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    return httpx.options(f"{running.address}/v1/chat/completions", headers=asks)


def test_pages_of_named_origins_use_the_api(guarded: Running, demo: Running) -> None:
    allowed = preflight(guarded, FRIEND)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == FRIEND
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    address = f"{guarded.address}/v1/chat/completions"
    reply = httpx.post(address, json=ASKED, headers=bearer() | {"Origin": FRIEND})
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == FRIEND
    refused = httpx.post(address, json=ASKED, headers={"Origin": FRIEND})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == FRIEND
    for running in (guarded, demo):
        assert preflight(running, STRANGER).status_code == 400
        assert "access-control-allow-origin" not in preflight(running, STRANGER).headers


@pytest.mark.parametrize("path", ["/config", "/v1/models", "/gradio_api/info"])
def test_pages_of_other_origins_read_nothing(demo: Running, path: str) -> None:
    for origin in (STRANGER, "null", "http://localhost:1234", "http://127.0.0.1:9"):
        reply = httpx.get(demo.address + path, headers={"Origin": origin})
        assert "access-control-allow-origin" not in reply.headers


def test_pages_of_other_origins_cannot_post_forms_to_the_api(demo: Running) -> None:
    form = {"prompt": (None, "a"), "num_frames": (None, "1")}
    for origin, status in ((STRANGER, 403), ("null", 403), (demo.address, 200)):
        reply = httpx.post(
            f"{demo.address}/v1/videos/sync", files=form, headers={"Origin": origin}, timeout=60
        )
        assert reply.status_code == status


def test_any_origin_is_allowed_by_an_asterisk(tmp_path: Path) -> None:
    assistant = scripted_assistant(tmp_path, ("Sure",))
    with running_server(assistant, Access(cors_origins=("*",))) as running:
        headers = {"Origin": STRANGER}
        reply = httpx.post(f"{running.address}/v1/chat/completions", json=ASKED, headers=headers)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "*"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that listens on all addresses and has a name."""
    assistant = scripted_assistant(tmp_path_factory.mktemp("opened"), ("Sure",))
    access = Access(cors_origins=(FRIEND,), allowed_hosts=("nextgpt.example",))
    with running_server(assistant, access, "0.0.0.0") as running:
        yield running


def own_addresses() -> list[str]:
    """Return the loopback address and the machine's other ones."""
    found = [one.address for some in psutil.net_if_addrs().values() for one in some
             if one.family == socket.AF_INET]  # fmt: skip
    return sorted({"127.0.0.1", "127.0.0.2", *found})


def test_open_server_answers_to_its_addresses_and_names_alone(opened: Running) -> None:
    port = opened.address.rpartition(":")[2]
    for address in own_addresses():
        place = f"http://{address}:{port}/v1/models"
        assert httpx.get(place).is_success
        for host in ("localhost", f"nextgpt.example:{port}", "NEXTGPT.example", f"[::1]:{port}"):
            assert httpx.get(place, headers={"Host": host}).is_success
        for host in ("evil.example", f"{address}.evil.example", "nextgpt.example.evil", "", "0"):
            reply = httpx.get(place, headers={"Host": host})
            assert reply.status_code == 400 and "--allowed_hosts" in reply.text


def test_open_server_answers_pages_of_its_own_and_named_origins_alone(opened: Running) -> None:
    port = opened.address.rpartition(":")[2]
    for address in own_addresses():
        own = f"http://{address}:{port}"
        for path in ("/v1/chat/completions", "/gradio_api/run/forget"):
            for origin, status in ((own, 200), (FRIEND, 200), (STRANGER, 403), ("null", 403)):
                body = ASKED | {"data": []}
                reply = httpx.post(own + path, json=body, headers={"Origin": origin})
                assert reply.status_code == status
                readable = reply.headers.get("access-control-allow-origin")
                assert readable == (FRIEND if origin == FRIEND else None)
                assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(("options", "word"), [
    ({"api_keys": ("",)}, "--api_key"),
    ({"api_keys": (" a",)}, "--api_key"),
    ({"cors_origins": ("https://a/b",)}, "--cors_origins https://a/b"),
    ({"cors_origins": ("chat.example",)}, "--cors_origins"),
    ({"root_path": "a"}, "--root_path a"),
    ({"root_path": "/a/"}, "--root_path /a/"),
    ({"media_domains": ("https://a",)}, "--allow_media_domains https://a"),
    ({"allowed_hosts": ("https://a",)}, "--allowed_hosts https://a"),
    ({"allowed_hosts": ("a:7860",)}, "--allowed_hosts a:7860"),
])  # fmt: skip
def test_access_options_that_make_no_sense_are_refused(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Access(**options)


def test_access_is_described_in_one_line() -> None:
    assert Access().describe("127.0.0.1", 7860).startswith("open to programs on this machine")
    opened = Access().describe("0.0.0.0", 7860)
    assert "everyone who can reach port 7860" in opened and "--api_key" in opened
    assert Access(KEYS).describe("0.0.0.0", 7860).endswith("with a key")


def test_access_options_come_from_arguments_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *arguments: served.append(arguments[-1]))
    monkeypatch.setenv(KEY_VARIABLE, "c, d")
    words = ["--api_key", "a", "--api_key", "b", "--cors_origins", f"{FRIEND},{STRANGER}"]
    words += ["--root_path", "/x", "--allow_media_domains", "media.example,[::1]:80"]
    words += ["--allowed_hosts", "a.example,b.example"]
    monkeypatch.setattr(sys, "argv", ["demo_app.py", *words])
    demo_app.main()
    domains = ("media.example", "[::1]:80")
    hosts = ("a.example", "b.example")
    assert served == [Access(("a", "b", "c", "d"), (FRIEND, STRANGER), "/x", domains, hosts)]


def test_taken_port_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        @staticmethod
        def from_config(*_: object) -> None:
            raise AssertionError("loaded")

    monkeypatch.setattr(server, "Assistant", Loader)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken.*--server_port"):
            server.serve(load_config("mini"), None, "127.0.0.1", port)


def test_port_is_bound_while_the_system_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    class Loader:
        @staticmethod
        def from_config(*_: object) -> None:
            socket.create_connection(("127.0.0.1", port)).close()
            raise UserError("loading")

    monkeypatch.setattr(server, "Assistant", Loader)
    with pytest.raises(UserError, match="loading"):
        server.serve(load_config("mini"), None, "127.0.0.1", port)


@pytest.mark.parametrize(("host", "port", "word"), [
    ("192.0.2.1", 0, "--server_name 192.0.2.1"),
    ("no.such.host.invalid", 0, "--server_name no.such.host.invalid"),
    ("127.0.0.1", 70000, "--server_port 70000"),
])  # fmt: skip
def test_address_that_cannot_be_listened_on_is_refused(host: str, port: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        listen(host, port)
