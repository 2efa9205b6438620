"""The new tokens: `<Img>` and `</Img>` around every input medium, and each decoder's signal tokens.

Their ids follow the base vocabulary and never result from tokenizing text: a typed `[IMG0]` stays
six characters.
"""

from nextgpt.common.modality import MODALITIES, Modality


class SignalTokens:
    """Ids of the new tokens, in the published order: `<Img>`, `</Img>`, IMG, VID, AUD.

    Args:
        counts: signal tokens of each modality; published 4, 24 and 8.
        first_id: the first new id, the size of the base vocabulary.
    """

    def __init__(self, counts: dict[Modality, int], first_id: int) -> None:
        self.counts = counts
        self.first_id = first_id
        self.open = first_id
        self.close = first_id + 1
        self._spans: dict[Modality, range] = {}
        self.end_id = first_id + 2
        for modality in MODALITIES:
            if modality in counts:
                self._spans[modality] = range(self.end_id, self.end_id + counts[modality])
                self.end_id += counts[modality]

    def __len__(self) -> int:
        """Number of new tokens."""
        return self.end_id - self.first_id

    def span(self, modality: Modality) -> list[int]:
        """Ids of a modality's signal tokens, in order."""
        return list(self._spans[modality])

    def modality_starting_with(self, token_id: int) -> Modality | None:
        """The modality whose first signal token is `token_id`."""
        return next((m for m, span in self._spans.items() if token_id == span.start), None)

    def name(self, token_id: int) -> str:
        """The written form of a new token: `<Img>`, `[VID3]`."""
        if token_id in (self.open, self.close):
            return "<Img>" if token_id == self.open else "</Img>"
        for modality, span in self._spans.items():
            if token_id in span:
                return f"[{MODALITIES[modality].token_prefix}{token_id - span.start}]"
        raise ValueError(f"{token_id} is not one of the new tokens")
