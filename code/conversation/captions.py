"""The form in which captions are read: in prompts, and by the decoders' text encoders."""

_TO_SPACE = str.maketrans(dict.fromkeys('"()*#:;~', " "))


def clean_caption(caption: str) -> str:
    """Lower-case `caption`, turn each of `"()*#:;~` into a space and trim the ends."""
    return caption.lower().translate(_TO_SPACE).strip()
