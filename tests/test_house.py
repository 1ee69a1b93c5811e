"""The package's floors: a file imports from lower floors only, so that each can be read after the ones below it."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_deepcache

FLOORS = (
    "apps, diffusers | generation | sampler | cache, checkpoints | unet | nets | diffusion, media, backend | "
    "errors, fields, _version"
)
HOUSE = Path(mlx_deepcache.__file__).parent


def test_imports_run_downhill():
    """A wing imports from lower floors and from itself, whether at the top of a file or inside a function."""
    floors = [floor.split(", ") for floor in FLOORS.split(" | ")]
    height = {wing: -number for number, floor in enumerate(floors) for wing in floor}
    assert set(height) == {p.stem for p in HOUSE.iterdir() if p.name[:2] != "__"}
    for file in HOUSE.rglob("*.py"):
        module = file.relative_to(HOUSE).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level or module == ("__init__",):
                continue
            room = [*module[: -node.level], *(node.module or "").split(".")]
            for name in [room[0]] if room[0] else [alias.name for alias in node.names]:
                own = height[module[0]]
                assert name == module[0] or height.get(name, -len(floors)) < own, (file.name, name)


def test_no_torch_diffusers_or_transformers_at_run_time():
    """But in ComfyUI's nodes, whose pictures are torch's tensors."""
    files = [path for path in HOUSE.rglob("*.py") if path.parent != HOUSE / "apps" / "comfyui"]
    for path in [*files, HOUSE.parent / "generate.py", HOUSE.parent / "convert.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "diffusers", "transformers", "DeepCache"}, path


def test_importing_is_light():
    """MLX comes with the first use, the tokenizer with the first prompt; transformers is for tests only."""
    check = (
        "import sys, mlx_deepcache; assert not {'mlx.core', 'tokenizers', 'PIL'} & set(sys.modules); "
        "pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, 'float32'); pipe.settings('a cat'); "
        "assert 'tokenizers' not in sys.modules and 'mlx.core' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=HOUSE.parent)
