"""What MLX multiplies with on Linux's CPU, and what is said if that is slow; in processes of their own."""

import subprocess
import sys

import pytest

from mlx_deepcache.backend import host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast BLAS")

MULTIPLIES = """
import ctypes, numpy as np, mlx.core as mx
assert hasattr(ctypes.CDLL(None), "cblas_sgemm")
a, b = np.random.default_rng(0).standard_normal((2, 300, 300), dtype=np.float32)
assert np.allclose(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu), a @ b, atol=1e-3)
"""


def run(code):
    """What a program writes to stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_fast_blas_is_found():
    assert run("import mlx_deepcache\nassert mlx_deepcache.SLOW is None" + MULTIPLIES) == ""


@pytest.mark.parametrize("libraries", ["found", "[]"])
def test_openblas_needs_nothing_of_the_system(libraries):
    """The OpenBLAS that is a dependency, where the system has no libgfortran; and if there is none at all."""
    if not host._beside_mlx("cmeel.prefix/lib/libopenblas.so.0"):
        pytest.skip("cmeel-openblas, a dependency, is not installed")
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


def test_mlx_imported_first_warns_once():
    code = "import mlx.core\nfrom mlx_deepcache import StableDiffusion\nimport mlx_deepcache as package\n"
    assert run(code + "package.StableDiffusion").count("import mlx_deepcache first") == 1
