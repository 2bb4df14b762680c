"""The recipe of one-pass tickets for domains of texts, on a few generated sentences."""

import json
import math
import sys

import domains
import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, BertModel

from shared.one_pass import DENSE, METHODS, ONE, TICKETS, average
from tests.recipes.small_texts import DOMAINS, save_data, save_encoder, sentences


def texts(number, seed):
    """Sentences, of which every fourth has no opinion."""
    return sentences(number, seed).map(
        lambda sample, index: {"sentiment": sample["sentiment"] * (index % 4 > 0)}, with_indices=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    data = save_data(folder / "data", texts(96, 0), texts(48, 1))
    words = Dataset.from_dict({"text": ["so so", "cable plot"] * 20, "language": ["far", "unused"] * 20})
    other = save_data(folder / "other", words, words)
    given = ["--model", save_encoder(folder / "encoder"), "--dataset", data, "--other_dataset", other]
    given += ["--other_routes", "far", "--output_dir", folder / "run", "--max_length", 8, "--sparsity", 0.5]
    given += ["--calibration_texts", 16, "--test_texts", 999, "--probe_texts", 999, "--seeds", 0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["domains.py", *map(str, given)])
        domains.main()
    return json.loads((folder / "run" / "results.json").read_text()), folder


@pytest.mark.slow
def test_every_method_has_a_cosine_for_each_domain_and_a_probe_where_sentiments_are_known(found):
    results, _ = found
    assert [line["method"] for line in results["figures"]] == METHODS
    reports = {report["method"]: report for report in results["reports"]}
    for report in reports.values():
        assert report["quality"].keys() == {*DOMAINS, "far"}
        assert [name for name, figures in report["quality"].items() if "probe" in figures] == list(DOMAINS)
    dense = reports[DENSE]
    assert all(figures["cosine"] == pytest.approx(1, abs=1e-9) for figures in dense["quality"].values())
    assert dense["faster"] == 1
    # The neurons of an encoder of random weights do little.
    assert average(reports[TICKETS], "cosine") < 1 - 1e-8 < average(dense, "cosine")
    assert average(reports[ONE], "probe") == sum(reports[ONE]["quality"][name]["probe"] for name in DOMAINS) / 2
    # One layer with 24 neurons of 16 inputs and outputs; a multiple of eight of them, 16, is nearest above a half.
    assert dense["active"] - reports[ONE]["active"] == 8 * (16 + 16 + 1)
    assert all(line["dense passes"] for line in results["costs"])


def test_the_probe_is_fitted_to_the_whole_encoder_and_asked_where_there_is_an_opinion(found):
    results, folder = found
    model = BertModel.from_pretrained(folder / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")

    def embedded(rows):
        found = []
        for text in rows["text"]:
            with torch.no_grad():
                mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            found.append((mean / mean.norm()).tolist())
        return found

    train, test = (texts(*given).filter(lambda sample: sample["sentiment"] != 0) for given in ((96, 0), (48, 1)))
    probe = LogisticRegression(max_iter=1000).fit(embedded(train), [value > 0 for value in train["sentiment"]])
    dense = next(report for report in results["reports"] if report["method"] == DENSE)
    for name in DOMAINS:
        own = test.filter(lambda sample, name=name: sample["domain"] == name)
        right = [
            said == (value > 0) for said, value in zip(probe.predict(embedded(own)), own["sentiment"], strict=True)
        ]
        assert dense["quality"][name]["probe"] == pytest.approx(sum(right) / len(right))


def test_embeddings_are_the_mean_over_tokens_that_are_no_padding(found):
    _, folder = found
    model = BertModel.from_pretrained(folder / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    texts = ["good film", "bad phone film", "so"]
    rows = Dataset.from_dict(
        {**tokenizer(texts, padding="max_length", max_length=8), "route": ["a"] * 3, "positive": [1, 0, -1]}
    )
    embedded = domains.embeddings(model, rows)
    for text, row in zip(texts, embedded, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        mean = [sum(float(state[index]) for state in states) / len(states) for index in range(16)]
        norm = math.sqrt(sum(value * value for value in mean))
        assert row.tolist() == pytest.approx([value / norm for value in mean], abs=1e-5)
