"""The page's fixtures: one server with the bundled model for a module; without the extra `ui` nothing is tested."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if all(map(find_spec, ("fastapi", "uvicorn", "python_multipart", "gradio"))):
    sys.path.append(str(Path(__file__).parents[1] / "server"))
    from serving import serve as serve_now
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def server():
    """One with the page, and the bundled model."""
    with serve_now(page=True) as client:
        yield client


@pytest.fixture
def serve():
    """serve(offers, limits, access, ...): another one with the page, for as long as a test needs it."""

    def serve(*offered, **options):
        return serve_now(*offered, page=True, **options)

    return serve
