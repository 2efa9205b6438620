"""Every shipped YAML trains with its data sets, order and stages.

The components are replaced by tiny ones, the course's data sets by the mini world's files under
the course's names and paths.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import STAGES, load_config
from test_config import SHIPPED
from tiny_components import tiny_overrides
from tiny_run import TinyRun, tiny_world

PROCESSES = {"7b_8x80gb": 8, "7b_2_nodes": 16}  # of which the tests start one
PAIR_SETS = {"image": "cc3m", "video": "webvid", "audio": "audiocap"}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini world, and its files at the paths of the course's data sets."""
    root = tmp_path_factory.mktemp("shipped") / "data"
    world = root / "mini_world"
    shutil.copytree(tiny_world() / "data" / "mini_world", world)
    for modality, name in PAIR_SETS.items():
        pairs = root / "T-X_pair_data" / name
        shutil.copytree(world / "T-X_pair_data" / modality, pairs)
        (pairs / f"{modality}.json").rename(pairs / f"{name}.json")
    asked, answered = root / "IT_data" / "T+X-T_data", root / "IT_data" / "T-T+X_data"
    ours = world / "IT_data"
    for name, media in {"llava": "images", "videochat": "videos"}.items():
        shutil.copytree(ours / "T+X-T_data" / "mini_question", asked / name / media)
        (asked / name / media / "mini_question.json").rename(asked / name / f"{name}.json")
    (asked / "alpaca").mkdir()
    shutil.copy(ours / "text" / "mini_text.json", asked / "alpaca" / "alpaca.json")
    answered.mkdir()
    for modality in MODALITIES:
        requests = ours / "T-T+X_data" / "mini_request" / "mini_request.json"
        shutil.copy(requests, answered / f"{modality}_instruction.json")
    mosit = root / "IT_data" / "MosIT_data"
    shutil.copytree(ours / "MosIT_data" / "mini_mosit", mosit / "media")
    (mosit / "media" / "mini_mosit.json").rename(mosit / "mosit.json")
    return root


@dataclass
class ShippedRun(TinyRun):
    """A run with a shipped YAML but tiny components, local paths and few steps."""

    config: str = ""
    data_root: Path = Path()

    @property
    def arguments(self) -> list[str]:
        """The command line of code/train.py."""
        system = tiny_world()
        config = load_config(self.config, self.stage)
        share = config.training.global_batch_size // PROCESSES.get(self.config, 1)
        overrides = [
            *tiny_overrides(system),
            "language_model.prompt_format=vicuna_v0",
            f"save_path={self.save_path}",
            f"data.data_dir={self.data_root}",
            f"data.cache_dir={system / 'cache'}",
            f"data.caption_embedding_dir={system / 'embed'}",
            f"training.global_batch_size={share}",
            f"training.max_steps={len(config.data.datasets)}",
        ]
        words = [word for override in overrides for word in ("--set", override)]
        return ["--stage", str(self.stage), "--config", self.config, *words]


@pytest.mark.parametrize("config", SHIPPED)
def test_shipped_config_trains_its_stages(config: str, data_root: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        run = ShippedRun(tmp_path, stage, config=config, data_root=data_root).finish()
        names = load_config(config, stage).data.datasets
        assert len(run.losses) == len(names)
        assert all(f"'{name}'" in run.output for name in names)
        assert run.metrics[-1]["skipped"] == 0
        assert set(run.delta) and (run.folder / "config.yaml").is_file()
