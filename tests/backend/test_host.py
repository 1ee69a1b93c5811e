"""What MLX finds in its process, and what is said if that is slow or too old; in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_deepcache.backend import host, ops

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast BLAS")

MULTIPLIES = """
import ctypes, numpy as np, mlx.core as mx
assert hasattr(ctypes.CDLL(None), "cblas_sgemm")
a, b = np.random.default_rng(0).standard_normal((2, 300, 300), dtype=np.float32)
assert np.allclose(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu), a @ b, atol=1e-3)
"""


def run(code, returns=0, **environment):
    """What a program writes to stderr."""
    env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == returns, done.stderr
    return done.stderr


def test_an_older_mlx_is_refused_in_a_line():
    code = """
import sys, mlx_deepcache, mlx.core
mlx.core.__version__ = "0.32.1.dev20260818+3f"
from mlx_deepcache.apps.generate import main_generate
sys.exit(main_generate(["--prompt", "a red apple", "--quiet"]))
"""
    assert run(code, 1) == (
        f"error: MLX should be {ops.OLDEST} or newer, got 0.32.1.dev20260818+3f; try pip install --upgrade mlx\n"
    )


def test_the_oldest_mlx_is_what_the_package_asks_for():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert set(re.findall(r'"mlx[^">]*>=([^;"]+)', setup)) == {ops.OLDEST}


@pytest.mark.parametrize(("given", "set_to"), [({}, "0"), ({"MLX_ENABLE_TF32": "1"}, "1")])
def test_float32_is_not_rounded_unless_asked_for(given, set_to):
    """By the variable that MLX reads at its first product (enable_tf32 in its utils.h)."""
    run(f"import mlx_deepcache, os; assert os.environ['MLX_ENABLE_TF32'] == {set_to!r}", **given)


@on_linux
def test_a_fast_blas_is_found():
    assert run("import mlx_deepcache\nassert mlx_deepcache.SLOW is None" + MULTIPLIES) == ""


@on_linux
@pytest.mark.parametrize("libraries", ["found", "[]"])
def test_openblas_needs_nothing_of_the_system(libraries):
    """The OpenBLAS that is a dependency, where the system has no libgfortran; and if there is none at all."""
    assert host._beside_mlx("cmeel.prefix/lib/libopenblas.so.0"), "cmeel-openblas, a dependency, is not installed"
    code = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("host", {host.__file__!r})  # not the package, which loads what there is
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
found, loads = host._beside_mlx("cmeel.prefix/lib/libopenblas.so.0"), ctypes.CDLL
def bare(name, *rest, **options):
    if name == "libgfortran.so.5":
        raise OSError
    return loads(name, *rest, **options)
ctypes.CDLL, host._libraries = bare, lambda: {libraries}
"""
    run(code + ("assert host._load_blas() is None" + MULTIPLIES if libraries != "[]" else "assert host._load_blas()"))


@on_linux
def test_mlx_imported_first_warns_once():
    code = "import mlx.core\nfrom mlx_deepcache import StableDiffusion\nimport mlx_deepcache as package\n"
    assert run(code + "package.StableDiffusion").count("import mlx_deepcache first") == 1
