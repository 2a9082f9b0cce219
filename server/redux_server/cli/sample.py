"""The picture that ``demo`` and the first start of ``serve`` offer: one the model can do well.

A module of its own, so that ``demo`` does not load the web framework that ``serve`` needs.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable

from redux_pipelines.loading.load import MINI
from redux_server.settings import ServerSettings


def sample(settings: ServerSettings) -> Traversable:
    """An icon for the embedded model, trained on icons (though not on this one); else a photo."""
    is_mini = settings.model == MINI and not settings.base
    name = "sample-icon.png" if is_mini else "sample.jpg"
    return files("redux_server").joinpath("static", name)
