"""Cards as files: their generated part is replaced, and their other text stays."""

import pytest

from hf_rtl.model_card.readme import Readme, merge_metadata


MINE = """---
# A comment.
license: mit  # as agreed
tags:
- mine
language:
    - fr
---

# My model

Text with a <!-- comment -->.
"""
OURS = {"library_name": "transformers", "tags": ["ours"]}


def written(content, metadata=OURS, part="Generated\n\nby us", **note):
    """The file after another save."""
    readme = Readme.parse(content)
    before = (readme.record or {}).get("metadata", {})
    merged = merge_metadata(readme.metadata, metadata, before)
    return readme.with_generated(part, merged, {"metadata": metadata, **note})


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("text", [MINE, "# Mine\nText", "Mine\n\n\n", "", "\ufeff---\nlicense: mit\n---\nMine"])
def test_text_that_was_there_stays_byte_for_byte(text, newline):
    content = text.replace("\n", newline).encode()
    mine = Readme.parse(content).before.encode()
    once = written(content)
    assert mine in once and Readme.parse(once).before.encode().startswith(mine)
    assert b"Generated" in once
    if newline == "\r\n" and newline.encode() in content:
        assert once.count(b"\n") == once.count(b"\r\n")
    assert written(once) == once
    again = written(once, part="Other\n\nby us")
    assert b"Generated" not in again and again.replace(b"Other", b"Generated") == once


def test_a_byte_order_mark_does_not_hide_the_metadata():
    assert Readme.parse("\ufeff---\nlicense: mit\n---\nMine".encode()).metadata == {"license": "mit"}


def test_text_around_the_generated_part_stays():
    once = written(b"Ahead.\n") + b"\nBehind.\n"
    assert written(once) == once
    changed = written(once, part="Several\n\nlines").decode()
    assert "Ahead.\n\n<!-- hf_rtl: begin" in changed and changed.endswith("<!-- hf_rtl: end -->\n\nBehind.\n")
    assert "Several\n\nlines" in changed and "Generated" not in changed


def test_metadata_stay_as_they_are_written_where_nothing_changes():
    front = Readme.parse(written(MINE.encode())).front
    assert front == "\n".join(
        ["# A comment.", "license: mit  # as agreed", "tags:", "- mine", "- ours", "language:", "    - fr"]
        + ["library_name: transformers"]
    )


def test_metadata_in_another_style_are_written_anew():
    content = b"---\n{license: mit, tags: [mine]}\n---\n"
    assert Readme.parse(written(content)).metadata == {
        "license": "mit",
        "tags": ["mine", "ours"],
        "library_name": "transformers",
    }


def test_what_was_changed_by_hand_wins_and_what_was_not_is_replaced():
    once = written(b"", {"license": "mit", "pipeline_tag": "other", "language": "fr"})
    edited = once.replace(b"license: mit", b"license: apache-2.0").replace(b"language: fr\n", b"extra: 1\n")
    again = written(edited, {"license": "bsd", "pipeline_tag": "fill-mask", "language": "fr", "base_model": "a/b"})
    assert Readme.parse(again).metadata == {
        "license": "apache-2.0",
        "pipeline_tag": "fill-mask",
        "extra": 1,
        "base_model": "a/b",
    }


def test_lists_keep_what_is_added_and_miss_what_is_removed_by_hand():
    once = written(b"", {"tags": ["a", "b"], "datasets": ["x"]})
    edited = once.replace(b"- a\n", b"- mine\n")
    again = written(edited, {"tags": ["a", "b", "c"], "datasets": ["y"]})
    assert Readme.parse(again).metadata == {"tags": ["mine", "b", "c"], "datasets": ["y"]}


def result(config, value):
    return {
        "task": {"type": "other"},
        "dataset": {"type": "d", "name": "D", **({"config": config} if config else {})},
        "metrics": [{"type": "accuracy", "value": value}],
    }


def test_results_of_others_stay_and_ours_are_replaced():
    other = {"name": "Other", "results": [result("route a", 0.5)]}
    theirs = {"model-index": [{"name": "Mine", "results": [result(None, 0.1), result("route b", 0.2)]}, other]}
    ours = {"model-index": [{"name": "Ours", "results": [result("route a", 0.3), result("fr, all routes", 0.4)]}]}
    merged = merge_metadata(theirs, ours, {})
    assert merged == {
        "model-index": [
            {"name": "Mine", "results": [result(None, 0.1), result("route a", 0.3), result("fr, all routes", 0.4)]},
            other,
        ]
    }
    assert merge_metadata(merged, {}, {}) == {"model-index": [{"name": "Mine", "results": [result(None, 0.1)]}, other]}
    assert merge_metadata({"model-index": ours["model-index"]}, {}, {}) == {}


def test_marks_in_what_is_generated_are_no_marks():
    content = written(b"Mine\n", part="a <!-- hf_rtl: end --> b <!-- hf_rtl: begin {} -->\nc")
    assert written(content, part="New").count(b"<!-- hf_rtl:") == 2


@pytest.mark.parametrize("damage", [(b"<!-- hf_rtl: end -->", b""), (b"<!-- hf_rtl: begin", b"<!-- hf_rtl: bgin")])
def test_with_a_mark_missing_nothing_is_taken_for_generated(damage):
    content = written(b"Mine\n").replace(*damage)
    once = written(content, part="New")
    assert content.partition(b"---\n\n")[2].strip() in once and b"New" in once
    assert written(once, part="New") == once


def test_a_record_that_was_typed_into_is_forgotten():
    content = written(b"").replace(b'{"metadata"', b'{metadata"')
    assert Readme.parse(content).record == {}
    assert b"Generated" in written(content) and written(content).count(b"hf_rtl: begin") == 1


def test_what_may_end_a_comment_is_written_otherwise():
    content = written(b"", given={"description": "a --> b -- c"})
    mark = content.decode().split("hf_rtl: begin")[1].splitlines()[0]
    assert mark.count("--") == 1 and mark.count(">") == 1
    assert Readme.parse(content).record["given"] == {"description": "a --> b -- c"}


def test_edits_since_a_push_are_seen():
    assert not Readme().is_edited
    assert Readme.parse(b"Mine").is_edited and Readme.parse(b"---\nlicense: mit\n---\n").is_edited
    ours = {"license": "mit", "tags": ["ours"]}
    fresh = written(b"", ours)
    assert not Readme.parse(fresh).is_edited
    assert not Readme.parse(written(fresh, {"license": "bsd"})).is_edited
    for edit in (fresh + b"Mine", fresh.replace(b"mit\n", b"bsd\n"), fresh.replace(b"license: mit\n", b"")):
        assert Readme.parse(edit).is_edited
        note = {"pushed": Readme.parse(edit).own_part()}
        pushed = written(edit, ours, **note)
        assert not Readme.parse(pushed).is_edited
        assert Readme.parse(pushed + b"More").is_edited
    readme = Readme.parse(fresh)
    for config, is_edited in ((None, True), ("route a", False)):
        added = {"model-index": [{"name": "Mine", "results": [result(config, 0.1)]}]}
        content = readme.with_generated("", {**ours, **added}, {"metadata": ours})
        assert Readme.parse(content).is_edited == is_edited


@pytest.mark.parametrize(
    "content, message",
    [
        (b"---\nlicense: [\n---\n", "the metadata of README.md, between its lines of dashes, is no YAML"),
        (b"---\n- a\n---\n", r"must be `key: value` lines between two lines of dashes, got \['a'\]"),
        (b"---\nmodel-index: what\n---\n", "`model-index` in the metadata .* must be a list of models .* got 'what'"),
        (
            b"---\nmodel-index:\n- name: a\n---\n",
            "`model-index` .* must be a list of models with `name` and `results`",
        ),
        (b"\xff", "README.md must be text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        Readme.parse(content)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "front", [BOMB, "a: &a [*a]\n", "a: &a {b: *a}\n", f"a: {60 * '['}{60 * ']'}\n", f"a: {9000 * '['}{9000 * ']'}\n"]
)
def test_metadata_that_are_larger_than_they_look_are_refused(front):
    with pytest.raises(ValueError, match=r"metadata of README.md may have 100,000 values.*nested 50 deep"):
        Readme.parse(f"---\n{front}---\ntext".encode())


def test_aliases_that_repeat_little_are_read():
    readme = Readme.parse(b"---\na: &a [x, y]\nb: *a\nc: [[[[*a]]]]\n---\ntext")
    assert readme.metadata == {"a": ["x", "y"], "b": ["x", "y"], "c": [[[[["x", "y"]]]]]}


def test_a_record_that_is_nested_too_deeply_is_forgotten():
    nested = 9000 * "["
    assert Readme.parse(f'<!-- hf_rtl: begin {{"a": {nested}}} -->\n<!-- hf_rtl: end -->'.encode()).record == {}


@pytest.mark.parametrize("front", ["a: !!bool x", "a: !!timestamp x", "a: 2001-13-01", "a: !!int x", "a: !!float x"])
def test_values_that_are_none_of_their_type_are_refused(front):
    with pytest.raises(ValueError, match="the metadata of README.md, between its lines of dashes, is no YAML"):
        Readme.parse(f"---\n{front}\n---\ntext".encode())


def test_a_key_that_takes_two_lines_is_written_once():
    ours = {"license": "mit"}
    readme = Readme.parse(b'---\n{"": "x", "tags": ["a"]}\n---\ntext')
    for _ in range(2):
        content = readme.with_generated("part", readme.merged(ours), {"metadata": ours})
        assert content.count(b"? ''") == 1
        readme = Readme.parse(content)
