"""What the chapters quote is what the program says."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_errors_are_quoted_as_they_are():
    """Each quoted piece of a message stands in the code, once its parts are put together."""
    code = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "mlx_deepcache").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    table = (REPOSITORY / "docs/errors.md").read_text(encoding="utf-8").partition("|---|---|---|\n")[2]
    quoted = [text for row in table.splitlines() for text in re.findall("`([^`]+)`", row.split("|")[1])]
    assert len(quoted) > 20
    for text in quoted:
        assert text.replace("129", "{len(things)}") in code, text
