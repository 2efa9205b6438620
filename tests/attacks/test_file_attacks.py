"""Files of the server, addresses that it would fetch, and uploads that a browser would run."""

import base64
import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from attack_harness import COMPLETIONS, UPLOAD, Target
from bombs import part
from serving_harness import PHOTO, user

pytestmark = pytest.mark.slow
FILE = "/gradio_api/file="
UP = 12  # folders: more than there are above any file

ROUTES = (
    FILE, "/gradio_api/file/", "/media/", "/media/a/", "/v1/files/", "/static/", "/assets/",
    "/svelte/", "/gradio_api/proxy=", "/gradio_api/stream/", "/gradio_api/custom_component/", "/",
)  # fmt: skip
SPELLINGS = (
    "/etc/passwd", "etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "%2f%2fetc/passwd",
    "../" * UP + "etc/passwd", "..%2f" * UP + "etc%2fpasswd", "%2e%2e/" * UP + "etc/passwd",
    "%2e%2e%2f" * UP + "etc%2fpasswd", "..%5c" * UP + "etc%5cpasswd", "..\\" * UP + "etc/passwd",
    "%252e%252e%252f" * UP + "etc%252fpasswd", "....//" * UP + "etc/passwd",
    "..;/" * UP + "etc/passwd", "%c0%ae%c0%ae/" * UP + "etc/passwd",
    "%ef%bc%8e%ef%bc%8e/" * UP + "etc/passwd", "a/" + "../" * UP + "etc/passwd",
    "file:///etc/passwd", "file:/etc/passwd", "%00/etc/passwd", "/etc/passwd%00.png",
    "/etc/passwd?a.png", "/etc/passwd;a.png", "/etc//passwd", "/etc/./passwd", "~root/etc/passwd",
    "/proc/self/root/etc/passwd", "/proc/self/environ", "/proc/self/cwd", "/dev/stdin", "/etc",
)  # fmt: skip


@pytest.fixture
def visitor(target: Target) -> Iterator[httpx.Client]:
    with target.http() as http:
        http.get("/")
        yield http


def upload(visitor: httpx.Client, name: str = "a.jpg", data: bytes = PHOTO.read_bytes()) -> str:
    reply = visitor.post(UPLOAD, files={"files": (name, data)})
    (path,) = reply.json()
    return path


def ask_page(visitor: httpx.Client, text: str, *paths: str) -> str:
    """Return all that the page's functions answer to a message with uploads."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    calls = visitor.get("/config").json()["dependencies"]
    send = next(one["id"] for one in calls if one["targets"] and one["targets"][0][1] == "submit")
    tab = secrets.token_hex(8)
    asked = {"data": [{"text": text, "files": files}], "fn_index": send, "session_hash": tab}
    asked["data"] += [None] * (len(calls[send]["inputs"]) - 1)
    assert visitor.post("/gradio_api/queue/join", json=asked).is_success
    return visitor.get("/gradio_api/queue/data", params={"session_hash": tab}).text


@pytest.mark.parametrize("route", ROUTES)
def test_no_spelling_of_a_path_leaves_the_folders(route: str, visitor: httpx.Client) -> None:
    for spelling in SPELLINGS:
        for end in ("", "/content"):
            url = httpx.URL(visitor.base_url, raw_path=f"{route}{spelling}{end}".encode())
            reply = visitor.get(url)
            assert reply.status_code in (400, 401, 403, 404, 405), (spelling, reply.status_code)
            assert "root:" not in reply.text and "PATH=" not in reply.text


@pytest.mark.parametrize("secret", ["/etc/passwd", "/proc/self/environ", "/etc"])
def test_link_in_the_place_of_a_file_is_not_followed(secret: str, visitor: httpx.Client) -> None:
    path = Path(upload(visitor))
    beside = path.with_name("b.jpg")
    path.unlink()
    for link in (path, beside):
        link.symlink_to(secret)
        for one in (link, link / "passwd"):
            assert visitor.get(f"{FILE}{one}").status_code == 404
        answer = ask_page(visitor, "a", str(link))
        assert "not a file that you uploaded" in answer and "root:" not in answer
        link.unlink()


def test_link_among_a_conversations_media_is_not_followed(
    target: Target, visitor: httpx.Client
) -> None:
    assert "Sure" in ask_page(visitor, "a", upload(visitor))
    made = next(one for one in target.folder.glob("sessions/*/*/*.png"))
    session = next(one for one in made.parents if one.parent.name == "sessions")
    address = f"/media/{session.name}/{made.relative_to(session)}"
    assert visitor.get(address).content == made.read_bytes()
    for secret in ("/etc/passwd", str(PHOTO)):
        made.unlink()
        made.symlink_to(secret)
        assert visitor.get(address).status_code == 404


ADDRESSES = (
    "http://{0}/a.png", "https://{0}/a.png", "HTTP://{0}/a", "//{0}/a", "http:{0}", "ftp://{0}/a",
    "rtsp://{0}/a", "rtmp://{0}/a", "tcp://{0}", "udp://{0}", "gopher://{0}/_a", "hls+http://{0}/a",
    "crypto+http://{0}/a", "cache:http://{0}/a", "async:http://{0}/a", "concat:http://{0}/a|a",
    "concatf:http://{0}/a", "subfile,,start,0,end,9,,:/etc/passwd", "file:///etc/passwd",
    "/etc/passwd", "pipe:0", "data:,http://{0}/a", "data:text/plain,a", "http://a@{0}/a",
    "http://{0}/v1/files/a/content", "lavfi:movie=/etc/passwd", "\\\\{0}\\a",
)  # fmt: skip
HEAD = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n"
REFERENCES = {
    "HLS": HEAD + "#EXTINF:1,\nhttp://{0}/a.ts\n#EXT-X-ENDLIST\n",
    "HLS over TCP": HEAD + "#EXTINF:1,\ntcp://{0}\n#EXT-X-ENDLIST\n",
    "HLS by concat": HEAD + "#EXTINF:1,\nconcat:http://{0}/a|file:///etc/passwd\n#EXT-X-ENDLIST\n",
    "HLS key": HEAD
    + '#EXT-X-KEY:METHOD=AES-128,URI="http://{0}/k"\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n',
    "HLS map": HEAD + '#EXT-X-MAP:URI="http://{0}/a"\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n',
    "HLS variants": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://{0}/a.m3u8\n",
    "M3U": "#EXTM3U\nhttp://{0}/a.mp3\n",
    "concat": "ffconcat version 1.0\nfile 'http://{0}/a.mp4'\nduration 1\n",
    "concat of a file": "ffconcat version 1.0\nfile /etc/passwd\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><Representation id='1' mimeType='video/mp4'>"
    "<BaseURL>http://{0}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "XML entity": '<!DOCTYPE a [<!ENTITY b SYSTEM "http://{0}/a">]><svg>&b;</svg>',
    "SVG": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink">'
    '<image x:href="http://{0}/a.png"/></svg>',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "a=control:rtsp://{0}/a\nm=video 0 RTP/AVP 96\n",
    "RTSP text": "RTSPtext\r\nrtsp://{0}/a\r\n",
    "RTSP response": "RTSP/1.0 302 Found\r\nLocation: rtsp://{0}/a\r\n\r\n",
    "ASX": '<asx version="3.0"><entry><ref href="http://{0}/a"/></entry></asx>',
    "SMIL": '<smil><body><video src="rtsp://{0}/a"/></body></smil>',
    "PLS": "[playlist]\nFile1=http://{0}/a.mp3\nLength1=-1\nVersion=2\n",
    "SubRip": "1\n00:00:00,000 --> 00:00:01,000\n<img src='http://{0}/a'>\n",
    "VobSub": "# VobSub index file, v7 (do not modify this line!)\nsub: http://{0}/a\n",
    "WebVTT": "WEBVTT\n\nSTYLE\n::cue {{ background: url(http://{0}/a) }}\n\n"
    "00:00.000 --> 00:01.000\na\n",
    "ASS": "[Script Info]\nScriptType: v4.00+\n[Fonts]\nfontname: http://{0}/a\n[Events]\n",
    "PostScript": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "ffmetadata": ";FFMETADATA1\ntitle=http://{0}/a\n",
    "HTML": "<html><meta http-equiv=refresh content='0;url=http://{0}/a'><img src='http://{0}/a'>",
}  # fmt: skip


@contextmanager
def unvisited() -> Iterator[str]:
    """An address to which nobody connects in the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()


def check_refused(reply: httpx.Response) -> None:
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert "root:" not in reply.text and "Traceback" not in reply.text


@pytest.mark.parametrize("address", ADDRESSES)
def test_address_as_a_medium_is_not_fetched(address: str, target: Target) -> None:
    with unvisited() as listener:
        url = address.format(listener)
        for modality in ("image", "video", "audio"):
            kind = f"{modality}_url"
            for medium in ({"type": kind, kind: {"url": url}}, {"type": kind, kind: url}):
                check_refused(target.post(COMPLETIONS, {"messages": [user("a", medium)]}))
        sound = {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}
        check_refused(target.post(COMPLETIONS, {"messages": [user("a", sound)]}))
        asked = {"data": ["a", [{"path": url, "meta": {"_type": "gradio.FileData"}}], {}]}
        with target.http() as visitor:
            visitor.get("/")
            event = visitor.post("/gradio_api/call/chat", json=asked).json()["event_id"]
            answer = visitor.get(f"/gradio_api/call/chat/{event}").text
        assert "event: error" in answer and "root:" not in answer


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_in_a_file_is_not_opened(name: str, visitor: httpx.Client) -> None:
    with unvisited() as listener:
        data = REFERENCES[name].format(listener).encode()
        for modality in ("image", "video", "audio"):
            reply = visitor.post(COMPLETIONS, json={"messages": [user("a", part(modality, data))]})
            check_refused(reply)
        for suffix in ("m3u8", "jpg"):
            answer = ask_page(visitor, "a", upload(visitor, f"a.{suffix}", data))
            assert 'role=\\"alert\\"' in answer and "root:" not in answer


SCRIPTS = (
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\"><svg onload=alert(1)>",
    "'onmouseover='alert(1)", "javascript:alert(1)", "</figure><iframe srcdoc=a>",
)  # fmt: skip
MARKUP = ("<script", "<img src=x", "<svg", "<iframe")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_in_names_and_texts_is_no_markup(script: str, visitor: httpx.Client) -> None:
    for name in (f"{script}.jpg", f"a.jpg{script}"):
        answer = ask_page(visitor, script, upload(visitor, name))
        assert "Sure" in answer or "alert" in answer
        assert not any(tag in answer for tag in MARKUP), answer[:3000]
    # Of no medium: the notice names it.
    answer = ask_page(visitor, script, upload(visitor, f"{script}.txt", b"a"))
    assert not any(tag in answer for tag in MARKUP), answer[:3000]
    reply = visitor.post(COMPLETIONS, json={"messages": [user(script)], "model": script})
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("name", "data"), [
    ("a.html", b"<script>alert(1)</script>"), ("a.svg", b"<svg onload='alert(1)'/>"),
    ("a.js", b"alert(1)"), ("a.xhtml", b"<html/>"), ("a.xml", b"<a/>"), ("a.pdf", b"%PDF-1.4"),
    ("a", b"<!DOCTYPE html><script>alert(1)</script>"), ("a.jpg", b"<script>alert(1)</script>"),
    ("a.shtml", b"<script>alert(1)</script>"), ("a.swf", b"FWS"),
])  # fmt: skip
def test_upload_is_no_document_for_a_browser(name: str, data: bytes, visitor: httpx.Client) -> None:
    reply = visitor.get(f"{FILE}{upload(visitor, name, data)}")
    assert reply.is_success and reply.headers["x-content-type-options"] == "nosniff"
    kind = reply.headers["content-type"].split(";")[0]
    attached = reply.headers.get("content-disposition", "").startswith("attachment")
    assert attached or kind in ("image/jpeg", "application/octet-stream"), kind


def test_made_medium_is_sandboxed(target: Target, visitor: httpx.Client) -> None:
    body = {"prompt": "a", "response_format": "url"}
    (made,) = visitor.post("/v1/images/generations", json=body).json()["data"]
    headers = visitor.get(made["url"]).headers
    assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox"


def test_base64_of_a_script_is_no_medium(target: Target) -> None:
    script = base64.b64encode(b"<script>alert(1)</script>").decode()
    for mime in ("text/html", "image/svg+xml", "image/png"):
        medium = {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{script}"}}
        reply = target.post(COMPLETIONS, {"messages": [user("a", medium)]})
        check_refused(reply)
        assert "<script" not in json.loads(reply.text)["error"]["message"]
