"""A subclass of Gradio's `Blocks` that refuses forged file paths.

Gradio accepts the path of a file from the client, and copies the file into the folder that it
serves: any file that the server can read. Its own check of paths is off in a page mounted into
another application, and a session's components, which an update replaces, cannot be relied on. Here
every call of every function passes one check before any file is touched.
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
    """A page whose functions receive only files of the visitor.

    Args:
        sessions: with the visitors' files.
        options: of `gr.Blocks`.
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
            gradio.Error: they do, or the function failed. Of an unexpected error only the type is
                shown: its message may contain paths.
        """
        try:
            if iterator is None:  # else the first call has checked, and removed the uploads
                for path in file_paths(inputs):
                    self._sessions.check_access(path, request.cookies.get(COOKIE, ""))
            return await super().process_api(
                block_fn, inputs, state=state, request=request, iterator=iterator, **others
            )
        except gr.Error:
            raise
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            _log.warning("a call of the page failed", exc_info=error)
            message = f"this call failed ({type(error).__name__}): reload, and try again"
            raise gr.Error(message, print_exception=False) from error


def file_paths(value: Any) -> Iterator[str]:
    """Find the paths of everything in `value` that Gradio might take for a file, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for one in value.values():
            yield from file_paths(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from file_paths(one)
