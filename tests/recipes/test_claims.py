"""`recipes/pages/claims.py`: docs/claims.md is made of the results of the cards."""

import json

import pytest

from pages import claims


def test_the_page_of_claims_follows_from_the_results():
    assert claims.CLAIMS.read_text() == claims.render()


def test_cells_are_found_by_the_name_of_their_line(tmp_path, monkeypatch):
    results = {
        "num_test": 4000,
        "figures": [
            {"method": "a, b", "sparsity": 0.25, "acc. (%)": "0.5 ± 0.1", "bytes": 12345},
            {"method": "a, b", "sparsity": 0.925, "acc. (%)": 0.12345, "bytes": None},
        ],
        "others": [{"scope": "layer", "seed": 2, "what": "fall", "cat": "90.0%"}],
    }
    (tmp_path / "some-results.json").write_text(json.dumps(results))
    template = tmp_path / "template.md"
    monkeypatch.setattr(claims, "TEMPLATE", template)
    monkeypatch.setattr(claims, "MODEL_CARDS", tmp_path)
    template.write_text(
        "{some[num_test]:,} {some[figures][a, b 25%][acc. (%)]} {some[figures][a, b 25%][bytes]} "
        "{some[figures][a, b 92.5%][acc. (%)]}{some[figures][a, b 92.5%][bytes]} {some[others][layer 2 fall][cat]}"
    )
    assert claims.render() == "4,000 0.5 ± 0.1 12,345 0.123 90.0%"
    template.write_text("{some[figures][a, b 90%][bytes]}")
    with pytest.raises(KeyError, match="a, b 90%"):
        claims.render()
    # A name that two lines share stands for neither.
    (tmp_path / "some-results.json").write_text(json.dumps({"figures": [{"method": "a", "bytes": n} for n in (1, 2)]}))
    template.write_text("{some[figures][a][bytes]}")
    with pytest.raises(KeyError, match="'a'"):
        claims.render()
