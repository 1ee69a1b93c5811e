"""The commands, run in this process or as scripts, and what is left by them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
SMALL = ["--height", "64", "--width", "64", "--steps", "3"]


def exit_code(main, flags):
    try:
        return main([str(flag) for flag in flags])
    except SystemExit as stop:  # argparse's own way out
        return stop.code


def left():
    """All that lies in the working folder, hidden files too."""
    return sorted(os.listdir())


def pixels(file="out.png"):
    return np.asarray(Image.open(file)).astype(int)


def recorded(file="out.png"):
    """The settings in a picture."""
    with Image.open(file) as image:
        return json.loads(image.text["mlx_deepcache"])


def assert_fails(capfd, code, expected, *words):
    """One line says what went wrong, and nothing was written."""
    out, err = capfd.readouterr()
    assert code == expected, err
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if re.match(r"((generate|convert)\.py: )?error: ", line)]
    assert len(errors) == 1, err
    assert err.rstrip().endswith(errors[0])
    for word in words:
        assert word in errors[0], err
    assert left() == []


def edit(file, **values):
    """Set values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def script(name, *flags, folder):
    command = [sys.executable, REPOSITORY / name, *map(str, flags)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def final_latents(draw, *flags):
    assert draw("--quiet", "--dtype", "float32", "--save-latents", "final.safetensors", *flags) == 0
    return load_file("final.safetensors")["latents"]
