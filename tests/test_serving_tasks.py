"""Routes for a single image, video or sound, health and metrics."""

import base64
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import av
import httpx
import pytest
from openai import APIStatusError
from PIL import Image

from nextgpt.conversation.messages import Text
from nextgpt.serving import task_routes
from nextgpt.serving.scheduler import Job
from serving_harness import (
    MODEL,
    SLOW_DECODING,
    Running,
    openai,
    opened,
    running_server,
    scripted_assistant,
    user,
    wait_until,
)


def post(demo: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{demo.address}/v1/{path}", json={"prompt": "a cat"} | body, timeout=60)


@pytest.fixture
def asked(demo: Running, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that enter the queue."""
    jobs: list[Job] = []
    answer = demo.queue.answer

    def record(job: Job) -> Any:
        jobs.append(job)
        return answer(job)

    monkeypatch.setattr(demo.queue, "answer", record)
    return jobs


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that answers with words alone."""
    with running_server(scripted_assistant(tmp_path_factory.mktemp("wordy"), ("Sure",))) as running:
        yield running


@pytest.mark.parametrize("route", ["images/generations", "videos/sync", "audio/generations"])
def test_task_asks_the_language_model_for_its_medium_alone(
    demo: Running, asked: list[Job], route: str
) -> None:
    assert post(demo, route, seed=3).status_code == 200
    (job,) = asked
    modality = {"images": "image", "videos": "video", "audio": "audio"}[route.partition("/")[0]]
    template = demo.queue.assistant.config.serving.task_prompts[modality]
    (turn,) = job.conversation.turns
    assert turn.parts == (Text(template.replace("{prompt}", "a cat")),)
    assert job.settings.modalities == {modality} and job.seed == 3


def test_task_image_is_that_of_the_chat(demo: Running) -> None:
    made = openai(demo).images.generate(prompt="a cat", model=MODEL, n=2, extra_body={"seed": 4})
    assert len(made.data) == 2 and made.data[0].b64_json != made.data[1].b64_json
    body = {"messages": [user("Generate an image of a cat")], "seed": 4}
    reply = httpx.post(f"{demo.address}/v1/chat/completions", json=body, timeout=60).json()
    (image,) = reply["choices"][0]["message"]["images"]
    assert base64.b64decode(made.data[0].b64_json) == opened(image["image_url"]["url"])


def test_task_image_comes_by_url_and_in_its_size(demo: Running) -> None:
    (made,) = post(demo, "images/generations", response_format="url", size="32x16").json()["data"]
    assert made["url"].startswith(f"{demo.address}/v1/files/")
    with Image.open(BytesIO(httpx.get(made["url"]).content)) as image:
        assert image.size == (32, 16)


def test_task_settings_reach_the_decoder(demo: Running, asked: list[Job]) -> None:
    post(demo, "images/generations", num_inference_steps=3, guidance_scale=2, quality="hd")
    post(demo, "videos/sync", steps=1, seconds="0.5", guidance=1)
    post(demo, "audio/generations", seconds=1.5)
    image, video, audio = (job.settings.decode for job in asked)
    assert (image["image"].num_inference_steps, image["image"].guidance_scale) == (3, 2)
    assert (video["video"].num_inference_steps, video["video"].num_frames) == (1, 4)
    assert audio["audio"].audio_length_in_s == 1.5


@pytest.mark.parametrize(("route", "body", "param", "status"), [
    ("images/generations", {"prompt": ""}, "prompt", 400),
    ("images/generations", {"prompt": "a" * 25_000}, "prompt", 400),
    ("images/generations", {"n": 5}, "n", 400),
    ("images/generations", {"size": "1024x1024"}, "size", 400),
    ("images/generations", {"size": "30x30"}, "size", 400),
    ("images/generations", {"size": "big"}, "size", 400),
    ("images/generations", {"steps": 0}, "num_inference_steps", 400),
    ("images/generations", {"response_format": "svg"}, "response_format", 400),
    ("images/generations", {"model": "dall-e-3"}, "model", 404),
    ("videos", {"seconds": "12000"}, "seconds", 400),
    ("videos", {"seconds": 300}, "seconds", 400),
    ("videos", {"num_frames": 4000}, "num_frames", 400),
    ("videos/sync", {"n": 2}, "n", 400),
    ("audio/generations", {"seconds": 60}, "seconds", 400),
    ("audio/generations", {"response_format": "midi"}, "response_format", 400),
])  # fmt: skip
def test_task_out_of_range_is_refused_by_parameter(
    demo: Running, route: str, body: dict, param: str, status: int
) -> None:
    reply = post(demo, route, **body)
    assert reply.status_code == status and reply.json()["error"]["param"] == param
    assert param in reply.json()["error"]["message"] or status == 404


@pytest.mark.parametrize("route", ["images/generations", "videos/sync", "audio/generations"])
def test_task_without_a_medium_tells_the_words(wordy: Running, route: str) -> None:
    reply = post(wordy, route)
    assert reply.status_code == 400 and "'Sure'" in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == "no_medium"


@pytest.mark.parametrize(("audio_format", "mime"), [
    ("wav", "audio/wav"), ("mp3", "audio/mpeg"), ("flac", "audio/flac"), ("opus", "audio/ogg"),
])  # fmt: skip
def test_task_sound_comes_in_the_format_asked(demo: Running, audio_format: str, mime: str) -> None:
    reply = post(demo, "audio/generations", response_format=audio_format, seconds=1)
    assert reply.headers["content-type"] == mime
    with av.open(BytesIO(reply.content)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        assert samples / container.streams.audio[0].rate == pytest.approx(1, abs=0.1)


def test_task_leaves_no_files(demo: Running) -> None:
    before = {*demo.folder.glob("served/*")}
    assert post(demo, "images/generations").status_code == 200
    assert post(demo, "audio/generations").status_code == 200
    assert {*demo.folder.glob("served/*")} == before


def test_video_is_made_as_a_job(demo: Running) -> None:
    client = openai(demo)
    video = client.videos.create_and_poll(
        prompt="a cat", model=MODEL, seconds="0.25", poll_interval_ms=100
    )
    assert video.status == "completed" and video.progress == 100 and video.expires_at
    assert video.seconds == "0.25" and video.prompt == "a cat" and video.model == MODEL
    content = client.videos.download_content(video.id).read()
    with av.open(BytesIO(content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 2
    assert client.videos.delete(video.id).deleted
    with pytest.raises(APIStatusError) as gone:
        client.videos.retrieve(video.id)
    assert gone.value.status_code == 404


def test_video_is_ordered_by_form(demo: Running) -> None:
    form = {"prompt": (None, "a cat"), "num_frames": (None, "3"), "seed": (None, "5")}
    reply = httpx.post(f"{demo.address}/v1/videos/sync", files=form, timeout=60)
    assert reply.headers["content-type"] == "video/mp4" and b"ftyp" in reply.content[:16]
    assert reply.content == post(demo, "videos/sync", num_frames=3, seed=5).content
    shown = {"prompt": (None, "a cat"), "input_reference": ("a.png", b"x")}
    refused = httpx.post(f"{demo.address}/v1/videos", files=shown)
    assert refused.status_code == 400 and "text fields" in refused.json()["error"]["message"]


def test_video_in_progress_is_deleted_and_frees_the_queue(demo: Running) -> None:
    order = post(demo, "videos", num_inference_steps=SLOW_DECODING["steps_video"]).json()
    assert order["status"] in ("queued", "in_progress") and order["object"] == "video"
    address = f"{demo.address}/v1/videos/{order['id']}"
    wait_until(lambda: httpx.get(address).json()["progress"] > 0)
    unready = httpx.get(f"{address}/content")
    assert unready.status_code == 409 and "in_progress" in unready.json()["error"]["message"]
    assert httpx.delete(address).json()["deleted"]
    wait_until(lambda: not demo.queue.pending, seconds=5)
    assert httpx.get(f"{address}/content").status_code == 404


def test_video_list_has_the_callers_videos_alone(demo: Running) -> None:
    mine, others = openai(demo), openai(demo)  # each keeps its cookie
    orders = [mine.videos.create(prompt=f"cat {n}", model=MODEL, seconds="0.25") for n in range(2)]
    listed = mine.videos.list()
    assert listed.object == "list" and [one.prompt for one in listed] == ["cat 1", "cat 0"]
    assert [one.id for one in listed] == [one.id for one in reversed(orders)]
    assert [*others.videos.list()] == []
    assert httpx.get(f"{demo.address}/v1/videos").json()["data"] == []
    mine.videos.delete(orders[0].id)
    assert [one.id for one in mine.videos.list()] == [orders[1].id]


def test_video_nobody_asks_about_leaves_the_queue(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_routes, "UNPOLLED_SECONDS", 4.0)
    monkeypatch.setattr(demo.queue.engine, "max_batch_size", 1)
    body = {"messages": [user("all of it")], "stream": True, "n": 4, "seed": 9} | SLOW_DECODING
    with httpx.stream("POST", f"{demo.address}/v1/chat/completions", json=body) as before:
        lines = before.iter_lines()
        next(lines)
        lost, wanted = (post(demo, "videos", num_frames=2, seed=n).json()["id"] for n in (1, 2))
        address = f"{demo.address}/v1/videos/{wanted}"
        seeds: set[int] = set()

        def is_dropped() -> bool:
            nonlocal seeds
            seeds = {job.seed for job in demo.queue.pending}
            return httpx.get(address, timeout=20).is_success and 1 not in seeds

        wait_until(is_dropped)
        assert 2 in seeds  # the answers before are not complete
    assert httpx.get(f"{demo.address}/v1/videos/{lost}").status_code == 404
    wait_until(lambda: httpx.get(address).json()["status"] == "completed")
    time.sleep(4.5)
    assert httpx.get(f"{address}/content").is_success


@pytest.mark.parametrize(
    "route", ["images/generations", "videos", "videos/sync", "audio/generations"]
)
def test_task_body_has_a_limit(demo: Running, route: str) -> None:
    reply = post(demo, route, prompt="a" * 1_000_000)
    assert reply.status_code == 413 and "1 MB" in reply.json()["error"]["message"]
    assert post(demo, route, prompt="a" * 999_000).status_code == 400


def test_video_that_fails_tells_why(wordy: Running) -> None:
    order = post(wordy, "videos").json()
    address = f"{wordy.address}/v1/videos/{order['id']}"
    wait_until(lambda: httpx.get(address).json()["status"] == "failed")
    error = httpx.get(address).json()["error"]
    assert error["code"] == "no_medium" and "Sure" in error["message"]
    assert httpx.get(f"{address}/content").status_code == 409


def test_tasks_are_refused_while_the_queue_is_full(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.serving.scheduler.MAX_PENDING", 0)
    for route in ("images/generations", "videos", "videos/sync", "audio/generations"):
        reply = post(demo, route)
        assert reply.status_code == 429 and reply.headers["retry-after"]


def sample(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"nextgpt_{name}"))


def test_metrics_count_requests_answers_tokens_and_seconds(wordy: Running) -> None:
    wait_until(lambda: not wordy.queue.pending)
    names = {
        "requests": 'requests_total{route="/v1/chat/completions",status="200"}',
        "refused": 'requests_total{route="/v1/images/generations",status="400"}',
        "finished": 'answers_total{outcome="finished"}',
        "generated": 'tokens_total{kind="generated"}',
        "prompt": 'tokens_total{kind="prompt"}',
        "language model": 'stage_seconds_total{stage="language_model"}',
    }
    before = {key: sample(wordy.address, name) for key, name in names.items()}
    body = {"messages": [user("a")]}
    usage = httpx.post(f"{wordy.address}/v1/chat/completions", json=body).json()["usage"]
    post(wordy, "images/generations", n=9)
    grown = {key: sample(wordy.address, name) - before[key] for key, name in names.items()}
    seconds = grown.pop("language model")
    assert 0 < seconds < 30
    assert grown == {
        "requests": 1, "refused": 1, "finished": 1, "generated": usage["completion_tokens"],
        "prompt": usage["prompt_tokens"],
    }  # fmt: skip
    assert sample(wordy.address, "queue_length") == 0
    assert sample(wordy.address, "resident_memory_bytes") > 1e8
    assert httpx.get(f"{wordy.address}/metrics").headers["content-type"].startswith("text/plain; v")


def test_health_tells_the_queue(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(f"{demo.address}/health").json() == {"status": "ok", "queue": 0}
    monkeypatch.setattr(demo.queue, "pending", [None] * 3)
    assert httpx.get(f"{demo.address}/health").json()["queue"] == 3
    assert httpx.head(f"{demo.address}/health").status_code == 200
