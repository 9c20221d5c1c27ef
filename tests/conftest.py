"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; inherited by workers
# Tokens of tests are not kept among the user's; inherited too.
os.environ["ALIGNDISTIL_CACHE"] = _CACHE = tempfile.mkdtemp(prefix="aligndistil-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.workers import Workers  # noqa: E402

# The same examples each time, so that a change is what makes a test fail; `--hypothesis-profile random` looks further.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("random")
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where torch sees no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Gloo processes: ``workers.run(world_size, function, *args)`` gives the results in the order of ranks."""
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and models (ALIGNDISTIL_DATA, or ../shared/data beside the repository)."""
    named = os.environ.get("ALIGNDISTIL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set ALIGNDISTIL_DATA")
    return folder
