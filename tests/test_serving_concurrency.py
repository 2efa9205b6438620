"""Concurrent requests, disconnects, failures during an answer, and memory use."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gradio_client import handle_file
from openai import BadRequestError, RateLimitError

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Cancelled, TextDelta
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Output, save_medium
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, setting_specs
from nextgpt.serving.scheduler import MAX_OF_CLIENT, Finished, Job, QueuePosition
from serving_harness import (
    MODEL,
    PHOTO,
    SLOW_DECODING,
    Running,
    client,
    image_part,
    openai,
    running_server,
    sampling_assistant,
    user,
    wait_until,
)


@pytest.fixture(scope="module")
def sampling_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(sampling_assistant(tmp_path_factory.mktemp("sampling"))) as running:
        yield running


def test_server_keeps_sixteen_concurrent_conversations_separate(
    sampling_server: Running, tmp_path: Path
) -> None:
    """Over two rounds, each receives the same text and media as alone."""

    def talk(number: int) -> list[tuple[str, list[str], list[bytes]]]:
        one = client(sampling_server)
        answers = []
        for text in (f"tell me of {number}", f"and of {number * 7}"):
            answer = one.predict(text=text, files=[], settings={"seed": number}, api_name="/chat")
            media = [Path(file).read_bytes() for file in answer["files"]]
            answers.append((answer["text"], answer["tokens"], media))
        return answers

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(talk, range(16)))
    assert len({str(one) for one in together}) == 16
    assistant = sampling_server.queue.assistant
    options = GenerationSettings.from_config(assistant.config)
    shown = 0
    for number in (0, 5, 15):
        turns: tuple[Turn, ...] = ()
        for text, answers in zip(
            (f"tell me of {number}", f"and of {number * 7}"), together[number], strict=True
        ):
            turns += (Turn("human", (Text(text),)),)
            alone = assistant.chat(Conversation(turns), seed=number, settings=options)
            media = [saved(output, tmp_path) for output in alone.outputs]
            assert answers == (alone.text, alone.token_names, media)
            shown += len(media)
            turns += (alone.turn,)
    assert shown


def saved(output: Output, folder: Path) -> bytes:
    save_medium(output, folder / "medium")
    return (folder / "medium").read_bytes()


def job(running: Running, **overrides: int) -> Job:
    options = GenerationSettings.from_config(running.queue.assistant.config)
    decode = {m: replace(one, num_inference_steps=100) for m, one in options.decode.items()}
    prompt = Conversation((Turn("human", (Text("all of it"),)),))
    return Job(prompt, replace(options, decode=decode), 0, running.folder / "desk")


def test_queue_reports_positions_and_drops_leavers(assistant: Assistant) -> None:
    with running_server(assistant) as running:
        running.queue.engine.max_batch_size = 1

        async def follow(one: Job, seen: list) -> None:
            async for event in running.queue.answer(one):
                seen.append(event)

        async def scene() -> None:
            jobs = [job(running) for _ in range(4)]
            seen: list[list] = [[] for _ in jobs]
            tasks = []
            for one, events in zip(jobs, seen, strict=True):
                tasks.append(asyncio.create_task(follow(one, events)))
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert [events[0] for events in seen] == [QueuePosition(n) for n in range(4)]
            jobs[1].stopped.set()  # somebody presses stop
            tasks[2].cancel()  # somebody closes the tab
            with pytest.raises(Cancelled):
                await tasks[1]
            await asyncio.gather(tasks[0], tasks[3])
            assert isinstance(seen[0][-1], Finished) and isinstance(seen[3][-1], Finished)
            assert QueuePosition(1) in seen[3] and QueuePosition(0) in seen[3]
            assert not any(isinstance(event, TextDelta) for event in seen[2])
            assert not running.queue.pending

        asyncio.run(scene())


def test_queue_refuses_requests_beyond_its_limit(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.serving.scheduler.MAX_PENDING", 0)
    for stream in (False, True):
        with pytest.raises(RateLimitError, match="try again later") as refused:
            openai(demo).chat.completions.create(model=MODEL, messages=[user("a")], stream=stream)
        assert refused.value.status_code == 429 and refused.value.code == "queue_full"
        assert int(refused.value.response.headers["Retry-After"]) > 0


def test_request_sent_while_the_tab_closes_is_dropped(demo: Running) -> None:
    options = GenerationSettings.from_config(demo.queue.assistant.config)
    handlers = Handlers(demo.queue, demo.sessions, options)
    session = demo.sessions.get("tab", "ada")
    demo.sessions.close("tab", "ada")
    with pytest.raises(UserError, match="conversation is closed"):
        asyncio.run(handlers.accept(session, "a", []))


def test_request_loading_files_while_the_chat_clears_is_dropped(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = demo.sessions.get("tab", "ada")
    show = session.build_turn

    def show_late(*prompt: Any) -> Turn:
        session.clear()
        return show(*prompt)

    monkeypatch.setattr(session, "build_turn", show_late)
    options = GenerationSettings.from_config(demo.queue.assistant.config)
    handlers = Handlers(demo.queue, demo.sessions, options)
    with pytest.raises(UserError, match="cleared meanwhile"):
        asyncio.run(handlers.accept(session, "a", []))
    assert not session.rounds


def test_settings_work_at_both_ends_of_their_ranges(assistant: Assistant) -> None:
    options = GenerationSettings.from_config(assistant.config)
    specs = setting_specs(options)
    low = {spec.name: spec.low for spec in specs if spec.name != "max_new_tokens"}
    quick = [spec for spec in specs if spec.group == "Words" or spec.label == "guidance"]
    for values in (low, {spec.name: spec.high for spec in quick}):
        turned = apply_settings(options, values)
        prompt = Conversation((Turn("human", (Text("all of it"),)),))
        assert len(assistant.chat(prompt, seed=SEED_LIMIT, settings=turned).outputs) == 3


def test_stop_ends_generation_soon(demo: Running) -> None:
    one = job(demo)

    async def scene() -> None:
        with pytest.raises(Cancelled):
            async for event in demo.queue.answer(one):
                if isinstance(event, TextDelta):
                    one.stopped.set()
        while demo.queue.pending:
            await asyncio.sleep(0.01)

    start = time.monotonic()
    asyncio.run(scene())
    assert time.monotonic() - start < 5
    assert not (one.folder / "audio_3.wav").exists()


def test_prompt_beyond_the_context_is_a_client_error(demo: Running) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="maximum context length is") as refused:
            openai(demo).chat.completions.create(
                model=MODEL, messages=[user("a " * 9000)], stream=stream
            )
        assert refused.value.code == "context_length_exceeded"


def test_broken_image_ends_the_answer_with_its_name(demo: Running, tmp_path: Path) -> None:
    broken = tmp_path / "half.jpg"
    broken.write_bytes(PHOTO.read_bytes()[:2000])
    with pytest.raises(BadRequestError, match="not readable as an image") as refused:
        openai(demo).chat.completions.create(model=MODEL, messages=[user("a", image_part(broken))])
    assert str(demo.folder) not in str(refused.value)


def test_client_disconnect_frees_the_queue(demo: Running) -> None:
    asked = {"messages": [user("all of it")], "stream": True} | SLOW_DECODING
    with httpx.stream("POST", f"{demo.address}/v1/chat/completions", json=asked) as reply:
        lines = reply.iter_lines()
        next(lines)
        wait_until(lambda: demo.queue.pending)
    wait_until(lambda: not demo.queue.pending, seconds=5)
    wait_until(lambda: not any(k.startswith("v1") for k in demo.sessions._open), seconds=5)


def test_client_partial_read_frees_the_queue(demo: Running) -> None:
    asked = {"messages": [user("all of it")]} | SLOW_DECODING
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{demo.address}/v1/chat/completions", json=asked, timeout=0.5)
    (job,) = demo.queue.pending
    wait_until(job.stopped.is_set, seconds=5)
    wait_until(lambda: not demo.queue.pending, seconds=5)


def test_client_with_many_answers_keeps_no_other_waiting(demo: Running) -> None:
    """Client addresses of the loopback network, answers of one and then of another."""

    async def ask(address: str, number: int) -> list[httpx.Response]:
        transport = httpx.AsyncHTTPTransport(local_address=address)
        body = {"messages": [user("all of it")]}
        async with httpx.AsyncClient(transport=transport, timeout=120) as http:
            place = f"{demo.address}/v1/chat/completions"
            return await asyncio.gather(*[http.post(place, json=body) for _ in range(number)])

    async def scene() -> None:
        greedy = asyncio.create_task(ask("127.0.0.2", MAX_OF_CLIENT + 3))
        while len(demo.queue.pending) < MAX_OF_CLIENT:
            await asyncio.sleep(0.01)
        (reply,) = await ask("127.0.0.1", 1)
        assert reply.is_success
        assert len(demo.queue.pending) > MAX_OF_CLIENT / 2 and not greedy.done()
        for job in demo.queue.pending:
            job.stopped.set()
        refused = [one for one in await greedy if one.status_code == 429]
        assert len(refused) == 3
        for one in refused:
            assert "of your answers" in one.text and int(one.headers["Retry-After"]) > 0

    asyncio.run(scene())


@pytest.mark.slow
def test_server_memory_stays_flat_over_200_requests(sampling_server: Running) -> None:
    process = psutil.Process(os.getpid())

    one = client(sampling_server)

    def ask(number: int) -> None:
        if number % 2:
            shown = [handle_file(str(PHOTO))]
            one.predict(f"number {number}", shown, {"seed": number}, api_name="/chat")
            one.predict(api_name="/forget")
            return
        openai(sampling_server).chat.completions.create(
            model=MODEL, messages=[user(f"number {number}", image_part())], seed=number
        )

    grown = []
    for number in range(240):
        ask(number)
        if number % 40 == 39:
            gc.collect()
            grown.append(process.memory_info().rss / 1e6)
    assert threading.active_count() < 100
    assert grown[-1] - grown[0] < 30, grown  # MB over 200 requests
