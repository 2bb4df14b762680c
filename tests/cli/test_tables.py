"""Tables for the terminal."""

from wcwidth import wcswidth

from hf_rtl_cli.tables import key_values, table


def test_columns_stand_below_each_other_with_wide_characters_too():
    lines = table(["route", "kept"], [["猫と犬", "1"], ["ant", "1,234"]], width=80).splitlines()
    assert lines == ["route    kept", "------  -----", "猫と犬      1", "ant     1,234"]
    assert {wcswidth(line) for line in lines} == {13}


def test_the_first_column_is_cut_to_the_width():
    rows = [["encoder.layer.0.attention.weight", "1"]]
    start, end = (
        table(["weight", "kept"], rows, width=20, keep_start=keep).splitlines()[-1] for keep in (True, False)
    )
    assert start == "encode….weight     1"
    assert end == "…ention.weight     1"


def test_several_columns_of_words_stand_to_the_left():
    lines = table(["file", "answer", "score"], [["a.png", "cat", ".5"]], num_words=2).splitlines()
    assert lines == ["file   answer  score", "-----  ------  -----", "a.png  cat        .5"]


def test_values_stand_below_each_other():
    assert key_values({"a": "1", "long": "2"}) == "a     1\nlong  2"
