"""Server-sent events: several answers in one stream, and a sign of life while there is nothing."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi.responses import StreamingResponse

from nextgpt.common.json_io import to_json

KEEP_ALIVE_SECONDS = 12.0  # so that no stream is silent for 15, on a busy machine either
_COMMENT = ": keep-alive\n\n"  # clients ignore it
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold it back
_Item = TypeVar("_Item")


def event_lines(content: Any) -> str:
    """Return an event with `content` as JSON, in ASCII: some clients split lines at U+2028 too."""
    return f"data: {to_json(content)}\n\n"


def event_stream_response(lines: AsyncIterator[str]) -> StreamingResponse:
    """Return a response that sends `lines` as they come, and comments in between."""
    return StreamingResponse(_keep_alive(lines), media_type="text/event-stream", headers=_HEADERS)


async def _keep_alive(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    following: asyncio.Future[str] | None = None
    async with aclosing(lines):
        try:
            while True:
                following = following or asyncio.ensure_future(anext(lines))
                await asyncio.wait((following,), timeout=KEEP_ALIVE_SECONDS)
                if not following.done():
                    yield _COMMENT
                    continue
                try:
                    line = following.result()
                except StopAsyncIteration:
                    return
                following = None
                yield line
        finally:
            if following and not following.done():
                following.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration):
                    await following


@dataclass(frozen=True)
class Started(Generic[_Item]):
    """An iterator whose first item is awaited already."""

    first: "asyncio.Future[_Item]"
    rest: AsyncIterator[_Item]


async def start(iterator: AsyncIterator[_Item], seconds: float) -> Started[_Item]:
    """Wait for the first item, at most `seconds`, so that an early error is raised here.

    Raises:
        Exception: of the iterator.
    """
    first = asyncio.ensure_future(anext(iterator))
    try:
        await asyncio.wait((first,), timeout=seconds)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return Started(first, iterator)


async def resumed(started: Started[_Item]) -> AsyncIterator[_Item]:
    """Yield all items of an iterator that was started; closing it closes that."""
    async with aclosing(started.rest):
        yield await started.first
        async for item in started.rest:
            yield item


async def merge(iterators: Sequence[AsyncIterator[_Item]]) -> AsyncIterator[tuple[int, _Item]]:
    """Yield the items of all iterators as they come, each with its iterator's index.

    Raises:
        Exception: the first of an iterator; the others are closed.
    """
    items: asyncio.Queue[tuple[int, _Item] | None] = asyncio.Queue()

    async def drain(index: int, iterator: AsyncIterator[_Item]) -> None:
        async with aclosing(iterator):
            async for item in iterator:
                items.put_nowait((index, item))

    tasks = [asyncio.create_task(drain(index, one)) for index, one in enumerate(iterators)]
    finished = asyncio.gather(*tasks)
    finished.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
        await finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(finished, *tasks, return_exceptions=True)
