"""Run a script twice: as it is written, for diffusers and the pip package DeepCache, and with its imports changed."""

import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from helpers import error

IMPORTS = (("from diffusers", "from mlx_deepcache.diffusers"), ("from DeepCache", "from mlx_deepcache.diffusers"))


def changed(script: str) -> str:
    """The script for this package: its imports name another module."""
    lines = []
    for line in script.splitlines():
        for old, new in IMPORTS:
            line = new + line.removeprefix(old) if line.startswith((f"{old} ", f"{old}.")) else line
        lines.append(line)
    return "\n".join(lines)


def run(script: str, **names) -> dict:
    """The script's names after it has run."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = dict(names)
        exec(compile(script, "script", "exec"), space)
    return space


def both(script: str, **names) -> tuple[dict, dict]:
    """Theirs and ours, of the same script and names."""
    ours = changed(script)
    assert all(
        line.startswith("from ")
        for line, was in zip(ours.splitlines(), script.splitlines(), strict=True)
        if line != was
    )
    return run(script, **names), run(ours, **names)


def compare(script: str, tolerance: float = 1e-4, **names) -> float:
    """The largest relative error of the latents that the script puts into `results`; pictures among these (values in
    [0, 1] or 0-255, or Pillow's) should agree to a tenth of a grey level on average."""
    theirs, ours = both(script, **{name: str(v) if isinstance(v, Path) else v for name, v in names.items()})
    assert len(theirs["results"]) == len(ours["results"]) > 0
    assert type(theirs["pipe"]).__module__.startswith("diffusers") and isinstance(
        theirs["pipe"], diffusers.DiffusionPipeline
    )
    assert (
        type(ours["pipe"]).__module__.startswith("mlx_deepcache")
        and type(ours["pipe"]).__name__ == type(theirs["pipe"]).__name__
    )
    errors = [0.0]
    for their, our in zip(theirs["results"], ours["results"], strict=True):
        assert type(their) is type(our)
        if isinstance(their, list):  # Pillow's
            grey = [np.stack([np.asarray(image, float) for image in images]) for images in (their, our)]
            assert np.abs(grey[0] - grey[1]).mean() < 0.1
        elif their.shape[-1] == 3 or their.shape[-3] == 3:
            assert their.shape == our.shape and their.dtype == our.dtype
            assert np.abs(np.asarray(their) - np.asarray(our)).mean() < 0.5 / 255
        else:
            assert their.dtype == our.dtype
            errors.append(error(our, their))
    assert max(errors) < tolerance, errors
    return max(errors)
