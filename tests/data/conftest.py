import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data sets that are not part of the project; see FORMIX_SHARED_DATA."""
    default = Path(__file__).parents[2] / "../shared/data"
    path = Path(os.environ.get("FORMIX_SHARED_DATA", default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set FORMIX_SHARED_DATA")
    return path
