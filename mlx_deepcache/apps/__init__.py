"""The commands."""

import os
import signal
import sys


def leave(number, frame):
    """What Ctrl-C does while a command's own modules are imported: an exception would be lost in some of them."""
    os.write(2, b"\ncancelled; nothing was done\n")
    os._exit(128 + number)


if os.path.basename(sys.argv[0]).startswith(("generate.py", "convert.py", "serve.py", "mlx-deepcache-")):
    signal.signal(signal.SIGINT, leave)
