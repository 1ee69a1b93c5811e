#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Draw for other programs: python serve.py, then http://127.0.0.1:7860/docs"""

import sys

from mlx_deepcache.apps.serve import main_serve

if __name__ == "__main__":
    sys.exit(main_serve())
