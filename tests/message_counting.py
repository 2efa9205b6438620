"""Counts what the ranks of a tiny run hand to collectives in each optimizer step."""

import json
from collections import Counter
from typing import Any

# Of torch.distributed, with the position of the tensor whose bytes are sent: for a gather the whole
# output, for a scatter the whole input.
_COLLECTIVES = {
    "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
}  # fmt: skip


def train_counting(*given: Any) -> None:
    """Train; write a row of bytes by collective for each step to `messages.RANK.jsonl`.

    Messages of less than a kilobyte are counted as `small`.
    """
    import torch.distributed as dist

    import tiny_run
    from nextgpt.training.engine import StepMetrics, TrainEngine

    counted: Counter[str] = Counter()

    def count(name: str, place: int) -> None:
        own = getattr(dist, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            tensors = [*arguments, *options.values()]
            size = tensors[place].numel() * tensors[place].itemsize
            counted.update({name: size} if size >= 1000 else {"small": 1})
            return own(*arguments, **options)

        setattr(dist, name, counting)

    for name, place in _COLLECTIVES.items():
        count(name, place)
    own_step = TrainEngine.step

    def step(engine: TrainEngine, *arguments: Any) -> StepMetrics:
        counted.clear()
        found = own_step(engine, *arguments)
        file = given[2].with_name(f"messages.{dist.get_rank()}.jsonl")
        with file.open("a") as rows:
            rows.write(json.dumps(counted) + "\n")
        return found

    TrainEngine.step = step
    tiny_run._train(*given)
