#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Draw a picture: python generate.py --prompt "a red apple" --cache-interval 3"""

import sys

from mlx_deepcache.apps.generate import main_generate

if __name__ == "__main__":
    sys.exit(main_generate())
