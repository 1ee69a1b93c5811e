"""A server on a real port, in threads of this process."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from mlx_deepcache.apps.server.http import Access, create_app
from mlx_deepcache.apps.server.offers import Offers
from mlx_deepcache.apps.server.service import Limits, Service


class Served(httpx.Client):
    """A client of a server that is there, and what the server is made of."""

    def __init__(self, service, port, **options):
        super().__init__(base_url=f"http://127.0.0.1:{port}", timeout=60, **options)
        self.service, self.port = service, port

    def job(self, **asked):
        """A job that was accepted."""
        answer = self.post("/api/v1/jobs", json=asked)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def look(self, job):
        return self.get(f"/api/v1/jobs/{job['id']}").json()

    def until(self, job, *statuses):
        """The job once it has one of these statuses."""
        end = time.monotonic() + 60
        while (now := self.look(job))["status"] not in statuses:
            assert time.monotonic() < end, now
            time.sleep(0.01)
        return now

    def ended(self, job):
        return self.until(job, "completed", "failed", "cancelled")

    def events(self, job):
        """(name, data) of each event, as they come."""
        with self.stream("GET", f"/api/v1/jobs/{job['id']}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = None
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))


@contextmanager
def serve(offers=None, limits=None, access=None, page=False, **options):
    service = Service(offers or Offers(), limits or Limits(), {"dtype": "float32"}, **options)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create_app(service, access or Access(port=port))
    hang_up = None
    if page:
        from mlx_deepcache.apps.page.mount import mount

        hang_up = mount(app, service)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with Served(service, port) as client:
            yield client
    finally:
        service.worker.stop()
        if hang_up is not None:
            hang_up()
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not service.worker.thread.is_alive()
