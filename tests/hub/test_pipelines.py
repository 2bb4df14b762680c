"""The stock pipelines of transformers, given nothing but the name of a repository."""

import pytest

from tests.hub.clients.pipelines import ask, ask_to_generate
from tests.hub.clients.repositories import push_with_processor
from tests.hub.processes import ClientError


TASKS = {"timm": "image-classification", "vit": "image-classification", "bert": "text-classification"}
# Pipelines resize with torchvision and timm with PIL, which round differently.
CLOSE = {"timm": 2e-3, "vit": 1e-5, "bert": 1e-5}


@pytest.mark.parametrize("kind", TASKS)
def test_membership_tickets_give_a_score_for_every_route(run, kind):
    name = f"org/members-{kind}"
    run(push_with_processor, name, kind)
    for answer, scores in run(ask, name, TASKS[kind], timm=kind == "timm"):
        assert answer == pytest.approx(scores, rel=CLOSE[kind]) and len(set(scores.values())) == 3
    for answer, scores in run(ask, name, TASKS[kind], timm=kind == "timm", route="bee"):
        assert answer == pytest.approx(scores, rel=CLOSE[kind]) and list(answer) == ["bee"]


@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_labels_tickets_answer_only_for_a_given_route(run, kind):
    name = f"org/labels-{kind}"
    run(push_with_processor, name, kind, ticket_task="labels")
    with pytest.raises(ClientError, match="ValueError: `route_ids` is missing.*'ant', 'bee', 'cat'.*with_route"):
        run(ask, name, TASKS[kind], timm=kind == "timm")
    said = []
    for route in ("ant", "bee"):
        asked = run(ask, name, TASKS[kind], timm=kind == "timm", route=route)
        for answer, scores in asked:
            assert answer == pytest.approx(scores, rel=CLOSE[kind]) and len(answer) == 4
        said.append(asked)
    assert said[0] != said[1]


def test_a_language_model_generates_through_the_ticket_that_is_asked_for(hub, run):
    pushed = run(push_with_processor, "org/says", "gpt2", ticket_task="labels")
    assert pushed["generated"] and "generation_config.json" in hub.repos["org/says"].at("main").files
    with pytest.raises(ClientError, match="ValueError: `route_ids` is missing.*'ant', 'bee', 'cat'.*with_route"):
        run(ask_to_generate, "org/says")
    answers = [run(ask_to_generate, "org/says", route_ids=route) for route in ("ant", "bee")]
    assert all(answer.startswith("rain and honey") for answer in answers) and answers[0] != answers[1]


def test_with_pil_a_pipeline_prepares_images_as_timm_does(run):
    run(push_with_processor, "org/exact", "timm")
    for answer, scores in run(ask, "org/exact", "image-classification", backend="pil", timm=True):
        assert answer == pytest.approx(scores, rel=1e-5)


def test_a_model_and_its_processor_are_one_commit(hub, run):
    run(push_with_processor, "org/along", "timm", commit_message="Both")
    pushed, created = hub.repos["org/along"].history()
    assert pushed.title == "Both" and pushed.files.keys() - created.files.keys() == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "similarity.png",
    }
