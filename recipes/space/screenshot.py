"""
Takes a picture of the page of a model (app.py) in chromium, without a window: `apt-get install chromium`.

    python recipes/space/screenshot.py runs/digits/final page.png --examples digits
    python recipes/space/screenshot.py runs/digits/final phone.png --examples digits --width 500
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image


def find_browser() -> str:
    """The browser's command. Raises `SystemExit` if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    raise SystemExit("a picture of the page needs chromium: apt-get install chromium")


def take(browser: str, address: str, file: Path, *, width: int, height: int) -> None:
    """Opens a page, waits until it has asked the tickets of its first example, and writes a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        # Time in the page runs ahead while it waits for nothing, so that it is complete when the time is over.
        options = [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--hide-scrollbars", "--disable-gpu"]
        options += ["--no-sandbox"]  # which chromium cannot have for root, as in containers; the page is ours
        size = [f"--window-size={width},{height}", f"--screenshot={file.resolve()}"]
        subprocess.run([browser, "--headless", *options, *size, address], check=True, capture_output=True, timeout=120)
    # A page has few colours, so that a palette of them is enough, for a third of the bytes.
    Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repo id")
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--examples", type=Path, help="folder of images, or of files of one text each")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=1690)
    arguments = parser.parse_args()
    browser = find_browser()

    from app import build

    page = build(arguments.model, arguments.examples)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    take(browser, address, arguments.file, width=arguments.width, height=arguments.height)
    page.close()


if __name__ == "__main__":
    main()
