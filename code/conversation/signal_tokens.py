"""The new tokens: `<Img>`, `</Img>` around every input medium, and every decoder's signal tokens.

They are ids behind the language model's own vocabulary and are never looked up in text: whoever
types `[IMG0]` has typed six characters.
"""

from nextgpt.common.modality import MODALITIES, Modality


class SignalTokens:
    """Ids of the new tokens, in the published order: `<Img>`, `</Img>`, IMG, VID, AUD.

    Args:
        counts: signal tokens of each modality; published 4, 24 and 8.
        first_id: the first new id, which is the number of rows of the language model's vocabulary.
    """

    def __init__(self, counts: dict[Modality, int], first_id: int) -> None:
        self.counts = counts
        self.first_id = first_id
        self.open = first_id
        self.close = first_id + 1
        self._runs: dict[Modality, range] = {}
        self.end_id = first_id + 2
        for modality in MODALITIES:
            if modality in counts:
                self._runs[modality] = range(self.end_id, self.end_id + counts[modality])
                self.end_id += counts[modality]

    def __len__(self) -> int:
        """How many new tokens there are."""
        return self.end_id - self.first_id

    def run(self, modality: Modality) -> list[int]:
        """The ids that together call the decoder of `modality`, in order."""
        return list(self._runs[modality])

    def modality_starting_with(self, token_id: int) -> Modality | None:
        """The modality whose run begins with `token_id`, or none."""
        return next((m for m, run in self._runs.items() if token_id == run.start), None)

    def name(self, token_id: int) -> str:
        """The written form of a new token, for people: `<Img>`, `[VID3]`."""
        if token_id in (self.open, self.close):
            return "<Img>" if token_id == self.open else "</Img>"
        for modality, run in self._runs.items():
            if token_id in run:
                return f"[{MODALITIES[modality].token_prefix}{token_id - run.start}]"
        raise ValueError(f"{token_id} is not one of the new tokens")
