"""The form in which the language model reads and writes captions.

Only the language model: a decoder's text encoder embeds a caption as it stands in the file.
"""

import re

_TO_SPACE = str.maketrans(dict.fromkeys('"()*#:;~', " "))
_SPACES = re.compile(r"\s{2,}")


def clean_caption(caption: str) -> str:
    """Lower-case `caption`, turn each of `"()*#:;~` into a space and strip the ends.

    Two or more white-space characters in a row become one space; a single one stays what it is.
    """
    return _SPACES.sub(" ", caption.lower().translate(_TO_SPACE)).strip()
