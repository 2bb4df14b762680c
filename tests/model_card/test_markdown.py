"""Pieces of Markdown, as a renderer reads them."""

import pytest
from markdown_it import MarkdownIt

from hf_rtl.model_card.markdown import fenced, number, percent, size, table, text


HOSTILE = ["a|b", "T-shirt/top", "<b>", "*x* _y_ `z`", "[a](b)", "ünïcødé 漢字 🐝", "\\|", "&lt;", "~~x~~", "$x$"]


def cells(markdown):
    """The texts of all cells, as a reader sees them."""
    inline = [token for token in MarkdownIt().enable(["table", "strikethrough"]).parse(markdown) if token.children]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special"}, "something was read as more than text"
    return ["".join(child.content for child in token.children) for token in inline]


def test_names_are_shown_as_they_are():
    assert cells(table(["name", "n"], [[text(name), "1"] for name in HOSTILE])) == [
        *("name", "n"),
        *(cell for name in HOSTILE for cell in (name, "1")),
    ]


def test_names_stay_in_their_line_and_are_cut():
    assert text("two\n\nlines\tof it") == "two lines of it"
    assert text("x" * 41) == "x" * 39 + "…" and text("x" * 40) == "x" * 40
    assert text(" ") == "' '"


def test_code_cannot_end_its_fence():
    (block,) = MarkdownIt().parse(fenced("a\n```\nb", "bibtex"))
    assert (block.type, block.info, block.content) == ("fence", "bibtex", "a\n```\nb\n")


@pytest.mark.parametrize(
    "num_bytes, words",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_719_844, "1.72 MB"),
        (999_600, "1 MB"),
        (45_200_000_000, "45.2 GB"),
    ],
)
def test_sizes_have_three_figures(num_bytes, words):
    assert size(num_bytes) == words.replace(" ", "\N{NO-BREAK SPACE}")


def test_numbers():
    assert number(None) == "–" and number(0.98765) == "0.988"
    percents = [percent(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0, 0.0007, 0.1, 1)]
    assert percents == ["0.0 %", "0.07 %", "10.0 %", "100.0 %"]
