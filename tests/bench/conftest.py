import pytest

from bench.record import SHAPES, model

from .tiny import SHAPE


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A model of the shape "tiny"."""
    return str(model(SHAPE, tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def known_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
