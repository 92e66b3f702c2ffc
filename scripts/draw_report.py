"""Take the screenshot of a report page for the README, in headless Chromium.

python scripts/draw_report.py RUN         writes docs/report.png

RUN is the first run of docs/start.md:
`ftlevel train --method lora --eval-on-start --output-dir runs/first`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs/report.png"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SIZE = "1000,960"


def main() -> int:
    """Write the picture; exit 1 where there is no page or no browser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a run")
    page = (parser.parse_args().run / "report.html").resolve()
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None or not page.is_file():
        print(f"{page} is needed, and one of {', '.join(_BROWSERS)}")
        return 1
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={_SIZE}", f"--screenshot={PICTURE}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
