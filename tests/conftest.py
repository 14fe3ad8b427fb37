"""Fixtures that several test files share, and how tests share the cores.

`make test` runs processes side by side, one thread each. A file's tests stay in one
process, as they share fixtures; each notebook goes to whichever is free.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def drawn_sprites(tmp_path_factory):
    return tmp_path_factory.mktemp("sprites")


@pytest.fixture
def sprite_cache(drawn_sprites, monkeypatch):
    """The sprites' cache in a folder of these tests, drawn once."""
    monkeypatch.setenv("EQL_CACHE", str(drawn_sprites))
    return drawn_sprites
