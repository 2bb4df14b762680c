"""
Render a model card as an HTML page, roughly as the Hub shows it, without its metadata.

    PYTHONPATH=recipes python -m pages.render_card runs/digits/final/README.md card.html
    chromium --headless --no-sandbox --screenshot=card.png --window-size=1000,5000 card.html

The page contains the card's pictures, so it is a single file. Needs markdown-it-py (`pip install -e ".[dev]"`).
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt


STYLE = Path(__file__).parents[1].joinpath("shared", "page.css").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path, help="a README.md")
    parser.add_argument("page", type=Path, help="the HTML file to write")
    arguments = parser.parse_args()
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(ModelCard.load(arguments.card).text)
    for picture in arguments.card.parent.glob("*.png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        html = html.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    arguments.page.write_text(f'<!doctype html>\n<meta charset="utf-8">\n<style>{STYLE}</style>\n{html}')


if __name__ == "__main__":
    main()
