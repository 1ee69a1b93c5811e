# PYTHON_ARGCOMPLETE_OK
"""Convert a checkpoint: python convert.py --model owner/name --output DIR"""

import sys

from mlx_deepcache.apps.convert import main_convert

if __name__ == "__main__":
    sys.exit(main_convert())
