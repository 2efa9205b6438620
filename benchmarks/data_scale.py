"""What the data of a run cost, by the number of rows and of loader processes.

    python benchmarks/data_scale.py [--rows 10000 3000000] [--workers 0 1 4 8] [--steps 200]

Each line is of a fresh process that opens caption pairs as stage 2 does, their captions to be
embedded online, and loads batches without training on them. `start`: seconds until the data are
open, the first time with the row index; `main`: private memory that opening and loading added to
the process; `loader`: private memory of the largest loader process; `ms`: loading a batch, while
nothing else runs, so that several loader processes share the cores.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import psutil

from index import private_bytes, write_pairs

_WARM_UP = 20  # batches


def measure(file: Path, cache: Path, workers: int, steps: int) -> tuple[float, int, int, float]:
    """Seconds to open, bytes of this process, of a loader process, milliseconds a batch."""
    # Imported late, as by train.py: loader processes, which import this module, need none of it.
    from nextgpt.common.device import choose_device
    from nextgpt.common.distributed import init_process_group
    from nextgpt.config.loader import load_config
    from nextgpt.training.data import load_batches, packing_options, rank_batches
    from nextgpt.training.trainer import RunOptions, Trainer

    pairs = f"{{name: pairs, path: {file}, direction: caption_to_medium}}"
    overrides = [
        f"data.datasets=[{pairs}]", "data.validation=null", "data.caption_embeddings=online",
        f"data.cache_dir={cache}", "training.epochs=1",
    ]  # fmt: skip
    config = load_config("mini", 2, overrides=overrides)
    init_process_group(choose_device())
    trainer = Trainer(config, RunOptions(2))
    before, begun = private_bytes(), time.perf_counter()
    trainer.open_dataset()
    start = time.perf_counter() - begun
    samples, schedule = trainer.examples, trainer.schedule
    order = rank_batches(schedule, 0, trainer.total_steps, samples.length)
    sizes = config.training.micro_batch_size, config.encoder.width
    with load_batches(
        samples, order, *sizes, num_workers=workers, **packing_options(config)
    ) as batches:
        deque(islice(batches, _WARM_UP), maxlen=0)
        begun = time.perf_counter()
        deque(islice(batches, steps), maxlen=0)
        milliseconds = (time.perf_counter() - begun) / steps * 1e3
        loaders = [one.memory_full_info().uss for one in psutil.Process().children()]
        own = private_bytes() - before
    return start, own, max(loaders, default=0), milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description="what the data of a run cost, by their size")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 3_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print("|      rows | workers | start s | main MB | loader MB | ms a batch |")
    print("|----------:|--------:|--------:|--------:|----------:|-----------:|")
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            file = Path(folder) / f"{rows}.json"
            write_pairs(file, rows)
            for workers in arguments.workers[:1] + arguments.workers:  # once more, with the index
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, context) as pool:
                    found = pool.submit(measure, file, Path(folder), workers, arguments.steps)
                    start, own, loader, milliseconds = found.result()
                print(
                    f"| {rows:9,} | {workers:7} | {start:7.2f} | {own / 1e6:7.1f} "
                    f"| {loader / 1e6:9.1f} | {milliseconds:10.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
