"""Forged file objects: no function of the page returns another visitor's or a server's file.

The functions are listed from the page itself, so that new ones are covered.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import httpx
import pytest

from nextgpt.serving.guarded_blocks import file_paths
from nextgpt.serving.middleware import COOKIE
from serving_harness import PHOTO, Running, running_server, scripted_assistant

SECRET = b"a secret of somebody else"  # behind a real picture, which Gradio would also convert
META = {"_type": "gradio.FileData"}
UPLOADED = "/gradio_api/upload"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(scripted_assistant(tmp_path_factory.mktemp("scripted"), ("Sure",))) as demo:
        yield demo


@dataclass
class Attacker:
    """A visitor with a session in which updates have already replaced Gradio components."""

    http: httpx.Client
    demo: Running
    tab: str = field(default_factory=secrets.token_hex)

    @property
    def visitor(self) -> str:
        return self.http.cookies[COOKIE]

    def upload(self, name: str = "own.png") -> str:
        files = {"files": (name, PHOTO.read_bytes(), "image/png")}
        (path,) = self.http.post(UPLOADED, files=files).json()
        return path

    def run(self, function: int, data: list) -> str:
        """Return a function's response to a direct call by its index."""
        asked = {"data": data, "fn_index": function, "session_hash": self.tab}
        return self.http.post("/gradio_api/run/any", json=asked).text

    def queue(self, function: int, data: list) -> str:
        """Return its response through the page's queue."""
        asked = {"data": data, "fn_index": function, "session_hash": self.tab}
        joined = self.http.post("/gradio_api/queue/join", json=asked)
        if joined.is_error:
            return joined.text
        return self.http.get("/gradio_api/queue/data", params={"session_hash": self.tab}).text

    def call(self, name: str, data: list) -> str:
        """Return its response by API name."""
        joined = self.http.post(f"/gradio_api/call/{name}", json={"data": data})
        if joined.is_error:
            return joined.text
        return self.http.get(f"/gradio_api/call/{name}/{joined.json()['event_id']}").text

    def call_by_parameters(self, name: str, data: dict[str, Any]) -> str:
        """Return its response by API name and parameter names."""
        joined = self.http.post(f"/gradio_api/call/v2/{name}", json=data)
        if joined.is_error:
            return joined.text
        return self.http.get(f"/gradio_api/call/v2/{name}/{joined.json()['event_id']}").text


@pytest.fixture
def attacker(demo: Running) -> Iterator[Attacker]:
    with httpx.Client(base_url=demo.address, timeout=20) as http:
        http.get("/")
        one = Attacker(http, demo)
        send = next(i for i, fn in demo.page.fns.items() if fn.name == "send")
        said = defaults(demo.page.fns[send])
        assert "Sure" in one.queue(send, [{"text": "hello", "files": []}, *said[1:]])
        yield one


def defaults(function: Any) -> list:
    """Return valid inputs of a function, from the page's default values."""
    values: list = []
    for block in function.inputs:
        if isinstance(block, gr.MultimodalTextbox):
            values.append({"text": "", "files": []})
        else:
            values.append(getattr(block, "value", None))
    return values


def places(function: Any) -> list[int]:
    """Return the inputs to forge: the first of each component type, and every API input."""
    kinds = [type(block).__name__ for block in function.inputs]
    return [i for i, kind in enumerate(kinds) if kind == "Api" or kinds.index(kind) == i]


def forms(path: str) -> list[Any]:
    """Return every value that may be interpreted as the file at `path`."""
    file = {"path": path, "meta": META}
    return [
        file,
        {"path": path},
        {**file, "is_stream": True},
        {**file, "orig_name": "../../a.png", "url": f"/gradio_api/file={path}", "size": 1},
        [file],
        {"text": "", "files": [file]},
        {"text": "", "files": [path]},
        {"path": {"path": path, "meta": META}, "meta": META},
        {"value": {"x": [[file]]}, "__type__": "update"},
        path,
    ]


def victims_upload(demo: Running) -> str:
    with httpx.Client(base_url=demo.address) as victim:
        content = PHOTO.read_bytes() + SECRET
        (path,) = victim.post(UPLOADED, files={"files": ("a.png", content)}).json()
    return path


def victims_session_file(demo: Running) -> str:
    path = demo.sessions.get("victim's tab", "victim").new_folder() / "a.png"
    path.write_bytes(PHOTO.read_bytes() + SECRET)
    return str(path)


def secret_picture(folder: Path) -> str:
    path = folder / "secret.png"
    path.write_bytes(PHOTO.read_bytes() + SECRET)
    return str(path)


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


def link(folder: Path) -> str:
    (folder / "link.png").symlink_to(secret_picture(folder))
    return str(folder / "link.png")


# By name, in the order in which they are tried: what blocks the server for good comes last.
Forger = Callable[[Running, Path, str], str]
FORGED: dict[str, Forger] = {
    "absolute": lambda demo, folder, own: secret_picture(folder),
    "passwords": lambda demo, folder, own: "/etc/passwd",
    "environment": lambda demo, folder, own: "/proc/self/environ",
    "relative": lambda demo, folder, own: os.path.relpath(secret_picture(folder)),
    "detour": lambda demo, folder, own: f"{own}/../../{os.path.relpath('/etc/passwd', '/')}",
    "own by a detour": lambda demo, folder, own: f"{Path(own).parent}/./{Path(own).name}",
    "link": lambda demo, folder, own: link(folder),
    "another's upload": lambda demo, folder, own: victims_upload(demo),
    "another's session": lambda demo, folder, own: victims_session_file(demo),
    "never uploaded": lambda demo, folder, own: str(Path(own).with_name("other.png")),
    "folder": lambda demo, folder, own: str(Path(own).parent),
    "address": lambda demo, folder, own: f"{demo.address}/config",
    "file address": lambda demo, folder, own: "file:///etc/passwd",
    "empty": lambda demo, folder, own: "",
    "null byte": lambda demo, folder, own: f"{own}\0",
    "pipe": lambda demo, folder, own: pipe(folder),
    "device": lambda demo, folder, own: "/dev/zero",
}


@pytest.mark.parametrize("kind", FORGED)
def test_page_functions_refuse_forged_files(
    kind: str, demo: Running, attacker: Attacker, tmp_path: Path
) -> None:
    """Try each kind in its plain form and in one of the others, in rotation."""
    other = 1 + list(FORGED).index(kind) % (len(forms("")) - 1)
    try_forged_file(kind, [0, other], demo, attacker, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORGED)
def test_page_functions_refuse_forged_files_in_every_form(
    kind: str, demo: Running, attacker: Attacker, tmp_path: Path
) -> None:
    try_forged_file(kind, range(len(forms(""))), demo, attacker, tmp_path)


def try_forged_file(
    kind: str, chosen: Iterable[int], demo: Running, attacker: Attacker, tmp_path: Path
) -> None:
    """Pass a forged file in the chosen forms to every function, and check for leaks."""
    path = FORGED[kind](demo, tmp_path, attacker.upload())
    fetched: set[str] = set()
    for index, function in demo.page.fns.items():
        ways = [partial(attacker.run, index), partial(attacker.queue, index)]
        if function.api_name:
            ways.append(partial(attacker.call, function.api_name))
        inputs = defaults(function)
        for number in chosen:
            form = forms(path)[number]
            for data in forged_data(function, inputs, form):
                # The page's ways differ before the function only: one form is enough for them.
                for way in ways if number == 0 else ways[:1]:
                    start = time.monotonic()
                    response = way(data)
                    assert time.monotonic() - start < 10, (function.name, form)
                    refused(response, path, tmp_path, demo)
                    fetched |= offered(response)
    for address in {path, *fetched}:
        reply = attacker.http.get(f"/gradio_api/file={quote(address)}")
        assert SECRET not in reply.content and b"root:" not in reply.content, address
        assert reply.status_code == 404 or Path(address).is_relative_to(demo.folder), address
    lent = [p for p, borrowers in demo.sessions._uploads.items() if attacker.visitor in borrowers]
    assert path not in lent
    for one in lent:
        assert SECRET not in Path(one).read_bytes() and Path(one).is_relative_to(demo.folder)
    holders = [p for p in demo.folder.rglob("*") if p.is_file() and SECRET in p.read_bytes()]
    assert {str(p) for p in holders} <= {path, *known_secrets(demo)}
    assert httpx.get(f"{demo.address}/v1/models", timeout=5).is_success


def forged_data(function: Any, inputs: list, form: Any) -> Iterator[list]:
    """Yield the inputs with `form` at each place in turn; `form` alone if there are no inputs."""
    if not inputs:
        yield [form]
    for place in places(function):
        yield [*inputs[:place], form, *inputs[place + 1 :]]


def refused(response: str, path: str, folder: Path, demo: Running) -> None:
    """Check that a response holds no secret content and its errors name no folder."""
    assert "root:" not in response and "PATH=" not in response
    for hidden in (folder, Path.cwd(), demo.folder):
        for error in re.findall(r'"error": ?("(?:[^"\\]|\\.)*")', response):
            assert str(hidden) not in error, error


def offered(response: str) -> set[str]:
    """Return the paths of all files in a response."""
    found: set[str] = set()
    for line in response.splitlines():
        try:
            found |= {*file_paths(json.loads(line.removeprefix("data:")))}
        except ValueError:
            continue
    return found


def known_secrets(demo: Running) -> set[str]:
    """Return the paths of the victims' files."""
    return {path for path in demo.sessions._uploads if path.endswith("a.png")} | {
        str(path) for path in demo.sessions.folder.rglob("a.png")
    }


def test_api_parameters_by_name_refuse_forged_files(demo: Running, attacker: Attacker) -> None:
    endpoints = attacker.http.get("/gradio_api/info").json()["named_endpoints"]
    assert "/chat" in endpoints
    for name, endpoint in endpoints.items():
        parameters = [one["parameter_name"] for one in endpoint["parameters"]]
        for parameter in parameters:
            for form in forms("/etc/passwd"):
                data: dict[str, Any] = {"text": "", "files": [], "settings": {}} | {parameter: form}
                asked = {key: value for key, value in data.items() if key in parameters}
                response = attacker.call_by_parameters(name.strip("/"), asked)
                assert "root:" not in response
    assert attacker.http.get("/gradio_api/file=/etc/passwd").status_code == 404


def test_page_functions_accept_the_visitors_files(demo: Running, attacker: Attacker) -> None:
    attaching = [i for i, fn in demo.page.fns.items() if fn.name == "_attach"]
    assert len(attaching) == 2
    for index in attaching:
        first, second = attacker.upload("first.png"), attacker.upload("second.png")
        box = {"text": "see", "files": [{"path": first, "meta": META}]}
        response = attacker.run(index, [box, {"path": second, "meta": META}])
        assert {first, second} == offered(response)
        for path in (first, second):
            reply = attacker.http.get(f"/gradio_api/file={path}")
            assert reply.content == PHOTO.read_bytes()
        again = json.loads(attacker.run(index, [box, None]))["data"][0]
        assert [file["path"] for file in again["files"]] == [first]


def test_textbox_replacement_fetches_no_url(demo: Running, attacker: Attacker) -> None:
    """An update creates a new textbox for the session, without patches of the first."""
    send = next(i for i, fn in demo.page.fns.items() if fn.name == "send")
    file = {"path": f"{demo.address}/config", "meta": META}
    inputs = [{"text": "a", "files": [file]}, *defaults(demo.page.fns[send])[1:]]
    for way in (attacker.run, attacker.queue):
        assert "not a URL" in way(send, inputs)
    assert not [path for path in demo.folder.rglob("config*") if path.is_file()]


def test_error_messages_name_the_file_without_its_folder(attacker: Attacker, demo: Running) -> None:
    receiving = [i for i, fn in demo.page.fns.items() if fn.name in ("send", "_attach", "chat")]
    assert len(receiving) >= 4  # `_attach` twice
    for index in receiving:
        inputs = defaults(demo.page.fns[index])
        inputs[-1] = {"path": "/srv/private/photo.png", "meta": META}
        response = attacker.run(index, inputs)
        assert (
            "photo.png: not a file that you uploaded here" in response and "private" not in response
        )


def test_cookie_not_issued_by_the_server_is_replaced(demo: Running) -> None:
    for cookie in ("x", "v1 chatcmpl-1", "a" * 31):
        reply = httpx.get(demo.address, headers={"Cookie": f"{COOKIE}={cookie}"})
        assert len(reply.cookies[COOKIE]) == 32


def test_session_cannot_be_closed_by_another_visitor(demo: Running, attacker: Attacker) -> None:
    session = demo.sessions.get("victim's conversation", "victim")
    closing = next(i for i, fn in demo.page.fns.items() if fn.name == "close")
    asked = {"data": [], "fn_index": closing, "session_hash": "victim's conversation"}
    attacker.http.post("/gradio_api/run/close", json=asked)
    assert demo.sessions.get("victim's conversation", "victim") is session and not session.closed
