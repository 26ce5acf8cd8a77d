from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .miniature import write_coco

torch.set_num_threads(1)


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "mini")
