"""Training needs fonts that a machine may not have."""

from __future__ import annotations

import pytest

from serving.nano.training.fonts import MONO, PROPORTIONAL, UNSEEN


@pytest.fixture(scope="session")
def fonts() -> None:
    """Skip what draws pages of free print where their fonts are not installed."""
    if not all(font.path.is_file() for font in (*MONO, *PROPORTIONAL, *UNSEEN)):
        packages = "fonts-dejavu-extra fonts-liberation2 fonts-noto-core fonts-noto-mono fonts-texgyre fonts-urw-base35"
        pytest.skip(f"fonts that nano is trained on are not installed (apt-get install {packages})")
