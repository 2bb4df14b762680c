"""Similarities of classes from tables and from WordNet."""

import numpy as np
import pytest

from hf_rtl.class_similarity import load_class_similarity, read_class_similarity, wordnet_similarity


TABLE = """,cat,dog,"owl, barn"
cat,1,0.5,0.25
dog,0.5,1,0.125
"owl, barn",0.25,0.125,1
"""

# entity 1 <- animal 2 <- pet 3 <- cat 5, dog 6; animal 2 <- predator 4 <- cat 5; animal <- hen 7; entity <- boot 8;
# Tom 9 is an instance of cat; a second sense of dog, 10, is a boot; alone 11 has nothing above it.
DATA = """  1 This is the licence, whose words | are no nouns
00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | that which is
00000002 03 n 02 animal 0 beast 0 002 @ 00000001 n 0000 ~ 00000003 n 0000 | a living thing
00000003 03 n 01 pet 0 001 @ 00000002 n 0000 | an animal kept
00000004 03 n 01 predator 0 001 @ 00000002 n 0000 | an animal that hunts
00000005 03 n 0b cat 0 a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 003 @ 00000003 n 0000 @ 00000004 n 0000 + 00000008 v 01
00000006 03 n 01 dog 0 001 @ 00000003 n 0000 | barks
00000007 03 n 01 guinea_hen 0 002 #m 00000005 n 0000 @ 00000002 n 0000 | clucks
00000008 03 n 01 boot 0 001 @ 00000001 n 0000 | footwear
00000009 03 n 01 Tom 0 001 @i 00000005 n 0000 | a cat of that name
00000010 03 n 01 dog 1 001 @ 00000008 n 0000 | a boot of that name
00000011 03 n 01 alone 0 000 | without anything above
"""
INDEX = """  1 This is the licence
alone n 1 0 1 0 00000011  
animal n 1 2 @ ~ 1 0 00000002  
boot n 1 1 @ 1 0 00000008  
cat n 1 2 @ + 1 0 00000005  
dog n 2 1 @ 2 0 00000006 00000010  
guinea_hen n 1 2 #m @ 1 0 00000007  
predator n 1 1 @ 1 0 00000004  
tom n 1 1 @i 1 0 00000009  
"""  # noqa: W291


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "similarity.csv"
    file.write_text(TABLE)
    return file


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "dict"
    folder.mkdir()
    (folder / "data.noun").write_text(DATA)
    (folder / "index.noun").write_text(INDEX)
    return folder


def test_a_table_is_read_in_the_order_of_the_routes(table):
    found = read_class_similarity(table, ["owl, barn", "cat", "dog"])
    assert found.dtype == np.float64 and found.tolist() == [[1, 0.25, 0.125], [0.25, 1, 0.5], [0.125, 0.5, 1]]
    assert load_class_similarity(table, ["dog", "cat"]).tolist() == [[1, 0.5], [0.5, 1]]


@pytest.mark.parametrize("start", ["\ufeff", ""])
def test_tables_of_spreadsheets_are_read(tmp_path, start):
    file = tmp_path / "similarity.csv"
    file.write_bytes((start + ",cat ,dog\r\ncat , 1, 0.5\r\ndog,0.5,1\r\n\r\n").encode())
    assert read_class_similarity(file, ["cat", "dog"]).tolist() == [[1, 0.5], [0.5, 1]]


def test_routes_that_a_table_lacks_are_named(table):
    with pytest.raises(ValueError, match=r"lacks the route\(s\) 'cats', 'frog'; did you mean 'cat'\? Its names are"):
        read_class_similarity(table, ["dog", "cats", "frog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the same names"),
        (",a,b\nb,1,0\na,0,1\n", "must have the same names"),
        (",a,b\na,1,0\n", "must have the same names"),
        (",a,b\na,1,x\nb,0,1\n", "must hold numbers and names only: could not convert string to float: 'x'"),
        (",a,b\na,1\nb,0,1\n", "must hold"),
        (",a,b\na,1\nb,0\n", "a finite number for every pair of its 2 names"),
        (",a,b\na,1,nan\nb,nan,1\n", "a finite number for every pair"),
        (",a,b\na,1,0.5\nb,0.25,1\n", "is not symmetric"),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path, text, message):
    file = tmp_path / "similarity.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_similarity(file, ["a", "b"])


def test_paths_go_over_the_nearest_common_hypernym(wordnet):
    names = ["Cat", "dog", "guinea hen", "Tom", "boot", "animal", "alone", "predator"]
    steps = {
        ("Cat", "dog"): 2,
        ("Cat", "guinea hen"): 3,
        ("Cat", "Tom"): 1,
        ("Cat", "boot"): 4,
        ("Cat", "animal"): 2,
        ("Cat", "predator"): 1,  # its second hypernym
        ("dog", "guinea hen"): 3,
        ("dog", "Tom"): 3,
        ("dog", "boot"): 4,  # though another sense of the word is a boot
        ("dog", "predator"): 3,
        ("guinea hen", "animal"): 1,
        ("Tom", "boot"): 5,
        ("boot", "animal"): 2,
    }
    found = load_class_similarity(wordnet, names)
    assert (found == found.T).all() and (np.diag(found) == 1).all()
    for (one, two), length in steps.items():
        assert found[names.index(one), names.index(two)] == pytest.approx(1 / (1 + length)), (one, two)
    assert (found[names.index("alone")] == [float(name == "alone") for name in names]).all()


@pytest.mark.parametrize("name", ["CAT", "cat/dog", "tabby/cat", "stray cat", "guinea_hen_cat", " cat "])
def test_names_of_classes_may_be_written_in_several_ways(wordnet, name):
    assert wordnet_similarity(wordnet, [name, "Tom", "predator"])[0].tolist() == [1, 0.5, 0.5]


def test_a_compound_is_looked_up_whole_first(wordnet):
    assert wordnet_similarity(wordnet, ["Guinea Hen", "animal"])[0, 1] == 0.5


def test_names_that_are_no_nouns_are_refused(wordnet):
    with pytest.raises(
        ValueError, match=r"has no noun for the route\(s\) '3', 'quickly'\. Give similarities as a csv"
    ):
        wordnet_similarity(wordnet, ["cat", "3", "quickly"])


@pytest.mark.parametrize("missing", ["index.noun", "data.noun"])
def test_a_folder_without_wordnet_is_refused(wordnet, missing):
    (wordnet / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}; .* `apt-get install wordnet-base`"):
        load_class_similarity(wordnet, ["cat", "dog"])
