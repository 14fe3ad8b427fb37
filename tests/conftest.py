"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def drawn_sprites(tmp_path_factory):
    return tmp_path_factory.mktemp("sprites")


@pytest.fixture
def sprite_cache(drawn_sprites, monkeypatch):
    """The sprites' cache in a folder of these tests, drawn once."""
    monkeypatch.setenv("EQL_CACHE", str(drawn_sprites))
    return drawn_sprites
