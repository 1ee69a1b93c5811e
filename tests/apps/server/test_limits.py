"""What bodies may hold: whatever it is, the answer is one that a client understands."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    "prompt steps seed seeds n width height strength image mask controls cache cache_interval min_psnr loras model "
    "sampler_name scheduler override_settings alwayson_scripts init_images size quality size infotext batch_size "
    "mask_blur resize_mode script_name styles refiner_start frames class_label eta timesteps vae_tiling".split()
)
ROUTES = ["/api/v1/plan", "/sdapi/v1/options", "/sdapi/v1/extra-single-image", "/sdapi/v1/png-info"]


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.dictionaries(KEYS | st.text(max_size=8), JSON, max_size=5))
def test_any_json(server, route, body):
    answer = server.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    bad_picture = answer.json() is not None and answer.json().get("error") in ("invalid_image", "address_not_allowed")
    assert answer.status_code < 500 or bad_picture, answer.text


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.dictionaries(KEYS, JSON, max_size=5))
@pytest.mark.parametrize("route", ["/sdapi/v1/img2img", "/v1/images/generations"])
def test_any_request_that_draws_nothing(server, route, body):
    """Each lacks what it needs, or asks for a model that is not there."""
    body = body | ({"init_images": []} if "sdapi" in route else {"model": "none"})
    answer = server.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
