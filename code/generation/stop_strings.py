"""Stop strings: an answer ends before the first occurrence of one of them in its text.

Unlike stop sequences, which are token ids of the chat template, they are chosen by the request and
may begin or end within a token.
"""

from collections.abc import Sequence

from nextgpt.conversation.messages import ContentPart, Text


class StopStrings:
    """The stop strings of one answer.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)

    def find(self, text: str) -> int | None:
        """Return the index of the first occurrence in `text`, or None."""
        return min((i for s in self.strings if (i := text.find(s)) >= 0), default=None)

    def settled(self, text: str) -> str:
        """Return the beginning of an incomplete answer's text that no further text can cut off."""
        if (end := self.find(text)) is not None:
            return text[:end]
        partial = (
            n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])
        )  # of a stop string at the end
        return text[: len(text) - max(partial, default=0)]

    def cut(self, parts: tuple[ContentPart, ...]) -> tuple[ContentPart, ...]:
        """Remove the first stop string from an answer, and everything behind it.

        The text is that of `join_texts`: the text parts, a line each.
        """
        end = self.find("\n".join(part.text for part in parts if isinstance(part, Text)))
        if end is None:
            return parts
        kept: list[ContentPart] = []
        start = 0  # of the part's text
        for part in parts:
            if not isinstance(part, Text):
                kept.append(part)
                continue
            if end <= start + len(part.text):
                return (*kept, Text(part.text[: end - start])) if end > start else tuple(kept)
            kept.append(part)
            start += len(part.text) + 1
        return tuple(kept)
