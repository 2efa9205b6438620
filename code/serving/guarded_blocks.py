"""Gradio's `Blocks` that refuses forged files.

Gradio takes the path of a file from whoever sends it, and copies what it finds there into the
folder that it serves: whatever the server may read. Its own check of paths is off in a page that is
mounted into another application, and the components of a session, which an update replaces, cannot
be relied on. Here every call of every function comes through one place, before any file is touched.
"""

import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr

from nextgpt.common.errors import UserError
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.sessions import Sessions

_log = logging.getLogger("demo")


class GuardedBlocks(gr.Blocks):
    """A page whose functions get no files but the visitor's own.

    Args:
        sessions: that know whose files those are.
        options: Gradio's.
    """

    def __init__(self, sessions: Sessions, **options: Any) -> None:
        super().__init__(**options)
        self._sessions = sessions

    async def process_api(
        self,
        block_fn: Any,
        inputs: list[Any],
        state: Any = None,
        request: Any = None,
        iterator: Any = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Call a function, unless its inputs name a file that is not the visitor's.

        Raises:
            gradio.Error: they do, or the function failed. What fails unforeseen is told by its kind
                alone: its text may name what lies where.
        """
        try:
            if iterator is None:  # later the files are used up
                for path in file_paths(inputs):
                    self._sessions.check_file(path, request.cookies.get(COOKIE, ""))
            return await super().process_api(
                block_fn, inputs, state=state, request=request, iterator=iterator, **others
            )
        except gr.Error:
            raise
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            _log.warning("a call of the page failed", exc_info=error)
            told = f"this call failed ({type(error).__name__}): reload, and try again"
            raise gr.Error(told, print_exception=False) from error


def file_paths(value: Any) -> Iterator[str]:
    """The path of everything in `value` that Gradio might take for a file, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for one in value.values():
            yield from file_paths(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from file_paths(one)
