"""Counts the files of output media, the targets of the denoising loss, which need not be there."""

from collections import Counter
from collections.abc import Collection

from nextgpt.common.modality import Modality
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.media.shard_members import medium_exists


def describe_missing_targets(
    dataset: ConversationDataset, modalities: Collection[Modality]
) -> list[str]:
    """A line for each data set and modality of which target media are missing.

    Reads all rows and looks for every file: 32 s of processor time for a million caption pairs.
    """
    lines = []
    for name, source in dataset.sources.items():
        total, missing = Counter[Modality](), Counter[Modality]()
        for row in range(dataset.sizes[name]):
            for medium in dataset.record(name, row).outputs:
                if medium.modality in modalities:
                    total[medium.modality] += 1
                    path = medium.target_path and source.media / medium.target_path
                    missing[medium.modality] += not (path and medium_exists(path))
        lines += [
            f"{name}: {missing[modality]:,} of {count:,} {modality} target media are not in "
            f"{source.media}: those samples train without the denoising loss"
            for modality, count in sorted(total.items())
            if missing[modality]
        ]
    return lines
