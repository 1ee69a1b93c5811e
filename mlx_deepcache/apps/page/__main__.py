"""python -m mlx_deepcache.apps.page: the server with its page."""

import sys

from ..serve import main_ui

if __name__ == "__main__":
    sys.exit(main_ui())
