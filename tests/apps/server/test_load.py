"""Many jobs: each accounted for, and nothing of them left."""

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import psutil
from serving import Limits, Offers

JOBS = 200


def test_200_jobs_with_cancels_among_them(serve, checkpoint):
    """Two clients; every fourth job is cancelled, wherever it is then."""
    with serve(Offers([f"tiny={checkpoint('sd15')}"]), Limits(queue=JOBS), keep=0.5) as server:

        def ask(number):
            job = server.job(prompt="a dog", steps=1, height=64, width=64, seed=number, previews=False)
            if number % 4 == 0:
                threading.Event().wait(random.Random(number).random() / 20)
                server.post(f"/api/v1/jobs/{job['id']}/cancel")
            return job["id"], number

        server.ended(server.job(prompt="a dog", steps=1, height=64, width=64, seed=1))
        gc.collect()
        before = psutil.Process().memory_info().rss, mx.get_active_memory()
        ended = {}
        service = server.service
        submit = service.submit

        def counted(wanted, name=None):
            job = submit(wanted, name)
            job.done.add_done_callback(lambda done: ended.setdefault(done.result().id, done.result().status))
            return job

        service.submit = counted
        with ThreadPoolExecutor(2) as pool:
            asked = dict(pool.map(ask, range(JOBS)))
        server.until(server.job(prompt="a dog", steps=1, height=64, width=64), "completed")
        assert set(ended) >= set(asked) and len(asked) == JOBS
        kinds = [ended[name] for name, number in asked.items() if number % 4]
        assert kinds == ["completed"] * len(kinds)
        assert {ended[name] for name, number in asked.items() if number % 4 == 0} <= {"cancelled", "completed"}
        assert "cancelled" in ended.values()
        threading.Event().wait(0.6)
        server.get("/api/v1/jobs")
        gc.collect()
        after = psutil.Process().memory_info().rss, mx.get_active_memory()
        assert after[0] - before[0] < 30e6 and abs(after[1] - before[1]) < 2e6, (before, after)
        assert not service.jobs.all() and service.worker.length == 0
