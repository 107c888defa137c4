import hashlib
import re
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from serving.nano.build import build_checkpoint, read_trained_weights
from serving.nano.pages import CORE, with_chars
from serving.nano.training.export import sample
from serving.nano.training.measure import measure_pages, read_pages
from serving.nano.training.model import load_model

FILES = resources.files("serving.nano")


def test_the_card_names_the_shipped_weights() -> None:
    data = read_trained_weights()
    assert data is not None
    assert len(data) < 30_000_000
    found = re.search(r"[0-9a-f]{64}", (FILES / "weights" / "CARD.md").read_text())
    assert found is not None
    assert hashlib.sha256(data).hexdigest() == found.group()


def test_the_sample_page_is_the_renderers() -> None:
    page = sample()
    with Image.open(str(FILES / "sample.png")) as image:
        assert np.array_equal(np.asarray(image), page.pixels)
    assert (FILES / "sample.txt").read_text() == page.text + "\n"


def test_the_shipped_model_reads(tmp_path: Path) -> None:
    model = load_model(build_checkpoint(tmp_path))
    page = sample()
    assert read_pages(model, [page]) == [page.text]
    rates = [reading.rate for reading in measure_pages(model, with_chars(CORE, 100, 350), 8, seed=3)]
    assert float(np.mean(rates)) < 0.1
