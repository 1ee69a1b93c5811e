"""The server's fixtures; without its extra, which needs Python 3.11, there is nothing to test."""

from importlib.util import find_spec

import pytest

if all(map(find_spec, ("fastapi", "uvicorn", "python_multipart", "webuiapi", "openai"))):
    from serving import Limits
    from serving import serve as serve_now
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def server():
    """One with the bundled model, and no cache but the package's own."""
    with serve_now(limits=Limits(queue=3)) as client:
        yield client


@pytest.fixture
def serve():
    """serve(offers, limits, access, ...): another one, for as long as a test needs it."""
    return serve_now
