"""Map-style dataset of conversations, indexed by (data set, row)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, DataConfig
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Turn
from nextgpt.dataset.catalog import DatasetSource, resolve_entry
from nextgpt.dataset.readers import READER_VERSION
from nextgpt.dataset.row_index import RowIndex, open_index
from nextgpt.media.shard_members import medium_exists


class ConversationDataset(Dataset[Conversation]):
    """Map-style: `dataset[name, row]` is a conversation with absolute paths.

    Building it builds missing row indexes, which leave unusable rows out. A lookup costs tens of
    microseconds and opens no media.

    Args:
        sources: the data sets, from `dataset.catalog.resolve_entry`.
        cache_dir: folder of the row indexes.

    Raises:
        UserError: an annotation file is missing, or has a record of an unknown form or too many
            unusable rows.
    """

    def __init__(self, sources: Sequence[DatasetSource], cache_dir: Path) -> None:
        self.sources = {source.name: source for source in sources}
        self.indexes = {source.name: _open_index(source, cache_dir) for source in sources}

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each data set."""
        return {name: len(index) for name, index in self.indexes.items()}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def length(self, key: tuple[str, int]) -> int:
        """Approximate length of the conversation at (data set, row): characters of its JSON."""
        name, row = key
        return self.indexes[name].length(row)

    def record(self, name: str, row: int) -> Conversation:
        """The conversation with media named relative to their folders."""
        return self.sources[name].read(self.indexes[name][row], self.file_row(name, row))

    def file_row(self, name: str, row: int) -> int:
        """Number of a row in its annotation file, for messages."""
        return self.indexes[name].number(row)

    def __getitem__(self, key: tuple[str, int]) -> Conversation:
        """The conversation at (data set, row).

        Raises:
            MediaError: an input medium is missing.
        """
        name, row = key
        source = self.sources[name]

        def resolve(part: ContentPart) -> ContentPart:
            if not isinstance(part, Media):
                return part
            if part.embedding is not None:
                target = part.target_path and str(source.media / part.target_path)
                embedding = str(source.embeddings / part.embedding)
                return replace(part, embedding=embedding, target_path=target)
            path = source.media / (part.path or "")
            if not medium_exists(path):
                row_there = self.file_row(name, row)
                raise MediaError(
                    f"{path} is missing: row {row_there} of {source.annotation} shows it"
                )
            return replace(part, path=str(path))

        turns = self.record(name, row).turns
        return Conversation(tuple(Turn(t.role, tuple(map(resolve, t.parts))) for t in turns))


def _open_index(source: DatasetSource, cache_dir: Path) -> RowIndex:
    notes = Counter[str]()
    version = f"{source.kind}-{READER_VERSION}-{source.media}"  # names depend on the media folder
    read = partial(source.read, notes=notes)
    return open_index(source.annotation, cache_dir, read, version, notes, source.limit)


def open_conversations(data: DataConfig) -> ConversationDataset:
    """Open the configured data sets.

    Raises:
        UserError: none is named, a name is unknown, or an annotation file is missing or wrong.
    """
    if not data.datasets:
        raise UserError("data.datasets is empty: name data sets of dataset/catalog.py, or paths")
    root, embeddings = project_path(data.data_dir), project_path(data.caption_embedding_dir)
    sources = [resolve_entry(entry, root, embeddings) for entry in data.dataset_entries]
    return ConversationDataset(sources, project_path(data.cache_dir))


def prompt_embeds_shapes(config: Config) -> dict[Modality, tuple[int, ...]] | None:
    """Shapes of precomputed caption embeddings; None if they are computed during training."""
    if config.data.caption_embeddings == "online":
        return None
    return {modality: tuple(one.prompt_embeds_shape) for modality, one in config.decoders.items()}
