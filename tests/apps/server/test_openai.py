"""OpenAI's images, as its own client asks for them."""

import base64
import threading
import time
from io import BytesIO

import numpy as np
import openai
import pytest
from helpers import MASK, PICTURE
from PIL import Image

import mlx_deepcache
from mlx_deepcache.apps.server.service import Limits

SMALL = {"steps": 6, "seed": 3}


def client(server, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", **options)


@pytest.fixture
def api(server):
    return client(server)


def decoded(text):
    return Image.open(BytesIO(base64.b64decode(text)))


def pixels(image):
    return np.asarray(image.convert("RGB"))


def packed(image, **options):
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return ("picture.png", buffer.getvalue(), "image/png")


def drawn(prompt, **options):
    pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, "float32")
    return [pixels(image) for image in pipe(prompt, **options).images]


def test_generate(api):
    said = {"steps": 12, "seed": 3, "guidance_scale": 4, "scheduler": "Euler a", "cache_interval": 2}
    answer = api.images.generate(prompt="a red apple", model="gpt-image-1", n=2, size="64x64", extra_body=said)
    options = {"steps": 12, "guidance_scale": 4, "scheduler": "euler-a", "cache_interval": 2}
    for seed, one in zip((3, 4), answer.data, strict=True):
        assert np.array_equal(pixels(decoded(one.b64_json)), drawn("a red apple", seeds=[seed], **options)[0])
    assert answer.mlx_deepcache["seeds"] == [3, 4] and answer.mlx_deepcache["full_steps"] == 6
    assert (answer.size, answer.output_format, answer.usage.total_tokens) == ("64x64", "png", 0)


@pytest.mark.parametrize("quality, cache", [("low", 5), ("high", 1), ("auto", 3)])
def test_quality_is_the_cache(api, quality, cache):
    answer = api.images.generate(prompt="a dog", quality=quality, extra_body={"steps": 12, "seed": 1})
    assert answer.mlx_deepcache["caches"] == [f"deepcache:interval={cache}"]
    own = api.images.generate(prompt="a dog", quality=quality, extra_body={"steps": 12, "cache_interval": 2})
    assert own.mlx_deepcache["caches"] == ["deepcache:interval=2"], "what is said of caches comes first"


def test_an_address_for_a_while(api, server):
    answer = api.images.generate(
        prompt="a dog", response_format="url", output_format="webp", output_compression=90, extra_body=SMALL
    )
    assert answer.data[0].b64_json is None
    got = server.get(answer.data[0].url)
    assert got.headers["content-type"] == "image/webp" and Image.open(BytesIO(got.content)).format == "WEBP"
    assert server.get("/v1/images/files/nothing.png").status_code == 404


def test_edit_draws_where_the_mask_is_transparent(api):
    picture, white = PICTURE.resize((64, 64)), MASK.resize((64, 64), Image.Resampling.NEAREST)
    mask = picture.convert("RGBA")
    mask.putalpha(white.point(lambda value: 255 - value))
    answer = api.images.edit(
        image=packed(picture), mask=packed(mask), prompt="a red apple", extra_body=SMALL | {"strength": 0.8}
    )
    ours = drawn("a red apple", image=picture, mask=white, steps=6, seeds=[3], strength=0.8, height=64, width=64)
    assert np.array_equal(pixels(decoded(answer.data[0].b64_json)), ours[0])
    outside = np.asarray(white) < 128
    assert np.array_equal(ours[0][outside], pixels(picture)[outside])
    alone = api.images.edit(image=packed(mask), prompt="a red apple", extra_body=SMALL | {"strength": 0.8})
    alone = pixels(decoded(alone.data[0].b64_json))
    assert np.array_equal(alone[outside], pixels(picture)[outside]), "its own transparency is the mask"
    assert not np.array_equal(alone[~outside], pixels(picture)[~outside])
    with pytest.raises(openai.BadRequestError, match="transparency"):
        api.images.edit(image=packed(picture), mask=packed(white), prompt="a dog")
    with pytest.raises(openai.BadRequestError, match="size"):
        api.images.edit(image=packed(picture), mask=packed(mask.resize((32, 32))), prompt="a dog")
    with pytest.raises(openai.BadRequestError, match="one picture"):
        api.images.edit(image=[packed(picture), packed(picture)], prompt="a dog")


def test_a_stream_of_partial_pictures(api):
    events = list(api.images.generate(prompt="a red apple", stream=True, partial_images=3, extra_body=SMALL))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert decoded(events[0].b64_json).size == (64, 64)
    assert np.array_equal(pixels(decoded(events[-1].b64_json)), drawn("a red apple", steps=6, seeds=[3])[0])
    edits = list(api.images.edit(image=packed(PICTURE), prompt="a dog", stream=True, size="64x64", extra_body=SMALL))
    assert edits[-1].type == "image_edit.completed"


def test_a_stream_that_fails_says_so(api):
    with pytest.raises(openai.APIError, match="NaN"):
        list(api.images.generate(prompt="a dog", stream=True, extra_body=SMALL | {"guidance_scale": 1e38}))


def test_models(api):
    assert [model.id for model in api.models.list()] == ["emoji"]
    assert api.models.retrieve("emoji").owned_by == "mlx_deepcache"
    with pytest.raises(openai.NotFoundError) as error:
        api.images.generate(prompt="a dog", model="other")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"prompt": "x" * 32_001}, "32000"),
        ({"size": "64"}, "WIDTHxHEIGHT"),
        ({"size": "65x64"}, "multiple of"),
        ({"n": 11}, "10"),
        ({"background": "transparent"}, "transparent"),
        ({"stream": True, "n": 2}, "one picture"),
        ({"extra_body": {"steps": 0}}, "1 or more"),
        ({"extra_body": {"image": "http://127.0.0.1/x.png"}}, "not allowed"),
    ],
)
def test_what_cannot_be(api, asked, words):
    with pytest.raises(openai.BadRequestError, match=words):
        api.images.generate(**{"prompt": "a dog"} | asked)


def test_a_full_queue_is_tried_again(serve):
    """The client waits as long as it is told, twice at most, and then gets its picture."""
    with serve(limits=Limits(queue=1)) as server:
        running = server.job(prompt="a dog", steps=900)
        server.until(running, "generating")
        waiting = server.job(prompt="a dog", steps=2)

        def free():
            time.sleep(0.5)
            server.post(f"/api/v1/jobs/{running['id']}/cancel")

        thread = threading.Thread(target=free)
        thread.start()
        answer = client(server).images.generate(prompt="a dog", extra_body=SMALL)
        thread.join()
        assert answer.data[0].b64_json and server.ended(waiting)["status"] == "completed"
        again = server.job(prompt="a dog", steps=900)
        server.until(again, "generating")
        server.job(prompt="a dog", steps=2)
        with pytest.raises(openai.RateLimitError) as error:
            client(server, max_retries=0).images.generate(prompt="a dog")
        assert error.value.code == "queue_full"


def test_who_leaves_a_stream_takes_the_job_along(serve):
    with serve() as server:
        stream = client(server).images.generate(
            prompt="a dog", stream=True, partial_images=3, extra_body={"steps": 900, "seed": 1}
        )
        while not server.service.worker.busy:
            time.sleep(0.01)
        stream.close()
        end = time.monotonic() + 10
        while server.service.worker.busy and time.monotonic() < end:
            time.sleep(0.05)
        assert [job["status"] for job in server.get("/api/v1/jobs").json()] == ["cancelled"]
