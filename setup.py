from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version: dict = {}
exec((root / "mlx_deepcache" / "_version.py").read_text(), version)
# FastAPI needs this Python; the package itself does not
SERVER = [f"{name}; python_version >= '3.11'" for name in ("fastapi>=0.165", "uvicorn", "python-multipart")]
setup(
    name="mlx_deepcache",
    version=version["__version__"],
    description="Stable Diffusion 1.x, 2.x and XL on Apple Silicon (MLX), with DeepCache built into the sampler",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["mlx_deepcache", "mlx_deepcache.*"]),
    package_data={
        "mlx_deepcache": ["checkpoints/bundled/**/*", "apps/*.txt", "apps/page/*.css", "generation/*.txt"],
        "mlx_deepcache.apps.comfyui": ["pyproject.toml", "example_workflows/*"],
    },
    install_requires=[
        # Before 0.32.2 a large convolution could come out as zeros on Metal; see mlx_deepcache/backend/ops.py
        "mlx>=0.32.2; sys_platform == 'darwin'",
        "mlx[cpu]>=0.32.2; sys_platform == 'linux'",
        # MLX's Linux wheel comes with a BLAS that is 30 times slower; see mlx_deepcache/backend/host.py
        "cmeel-openblas; sys_platform == 'linux'",
        "numpy>=2",
        "huggingface_hub",
        "safetensors",
        "threadpoolctl",
        "tokenizers",
        "pillow",
        "tqdm",
    ],
    scripts=["generate.py", "serve.py"],  # which mlx.launch looks for in PATH
    entry_points={
        "console_scripts": [
            "mlx-deepcache-generate = mlx_deepcache.apps.generate:main_generate",
            "mlx-deepcache-convert = mlx_deepcache.apps.convert:main_convert",
            "mlx-deepcache-calibrate = mlx_deepcache.apps.calibrate:main_calibrate",
            "mlx-deepcache-serve = mlx_deepcache.apps.serve:main_serve",
            "mlx-deepcache-comfyui = mlx_deepcache.apps.link:main_comfyui",
            "mlx-deepcache-ui = mlx_deepcache.apps.serve:main_ui",
        ]
    },
    extras_require={
        "completion": ["argcomplete"],
        "server": SERVER,
        # Its minor releases have changed how masks are painted
        "ui": [*SERVER, "gradio>=6.31,<6.32; python_version >= '3.11'"],
        "mkl": ["mkl"],
        "video": ["av"],
        "cuda": ["mlx[cuda]>=0.32.2; sys_platform == 'linux'"],
        "test": [
            "torch==2.13.0",
            "diffusers",
            "DeepCache",
            "transformers",
            "peft",
            "argcomplete",
            "av",
            "openai-clip",
            "hypothesis",
            "psutil",
            "fastapi>=0.165; python_version >= '3.11'",
            "uvicorn",
            "python-multipart",
            "gradio>=6.31,<6.32; python_version >= '3.11'",
            "playwright",
            "webuiapi",
            "openai",
            "scikit-image",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.5",
        ],
        "benchmark": ["scikit-image", "matplotlib"],
    },
)
