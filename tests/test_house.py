"""The package's floors: a file imports from lower floors only, so that each can be read after the ones below it."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_deepcache

FLOORS = [
    {"errors", "host", "ops"},
    {
        *(
            "config",
            "cache",
            "forecast",
            "noise",
            "images",
            "memory",
            "emphasis",
            "vocabulary",
            "pictures",
            "fewstep",
            "parsing",
        ),
    },
    {"policies", "blocks", "solvers", "clip", "ldm", "architecture"},
    {"policy_text", "schedulers", "unet", "vae", "taesd", "guidance"},
    {"prompts", "weights", "macs", "tiling", "controlnet", "front"},
    {"attention_cache", "hub", "singlefile", "lora", "embeddings"},
    {"cache_run", "sources"},
    {"sampler", "autoencoders"},
    {"checkpoint"},
    {"settings", "options", "addons", "preview", "metadata"},
    {"pipeline"},
    {"comparison"},
    {"cli"},
]
ROOM = Path(mlx_deepcache.__file__).parent


def test_imports_run_downhill():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    files = {path.stem: path for path in ROOM.glob("*.py") if path.stem != "__init__"}
    assert set(files) == set(floor_of)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                for other in imported:
                    if other.islower() and other[0] != "_":  # the rest is __init__.py's own
                        assert floor_of[other] < floor_of[name], (name, other)


def test_no_torch_or_diffusers_at_run_time():
    for path in [*ROOM.glob("*.py"), ROOM.parent / "generate.py", ROOM.parent / "convert.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "diffusers", "DeepCache"}, path


def test_importing_is_light():
    """MLX comes with the first use, transformers with the first prompt."""
    check = (
        "import sys, mlx_deepcache; assert not {'mlx.core', 'transformers', 'PIL'} & set(sys.modules); "
        "pipe = mlx_deepcache.StableDiffusion.from_pretrained(None, 'float32'); pipe.settings('a cat'); "
        "assert 'transformers' not in sys.modules and 'mlx.core' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOM.parent)
