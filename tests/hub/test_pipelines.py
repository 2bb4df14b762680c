"""The stock pipelines of transformers, given nothing but the name of a repository."""

import pytest
from hub.clients import ask, push_with_processor
from hub.processes import ClientError


TASKS = {"timm": "image-classification", "vit": "image-classification", "bert": "text-classification"}


@pytest.mark.parametrize("kind", TASKS)
def test_membership_tickets_give_a_score_for_every_route(run, kind):
    name = f"org/members-{kind}"
    run(push_with_processor, name, kind)
    for answer, scores in run(ask, name, TASKS[kind]):
        assert answer == pytest.approx(scores, rel=1e-5) and len(set(scores.values())) == 3
    for answer, scores in run(ask, name, TASKS[kind], route="bee"):
        assert answer == pytest.approx(scores, rel=1e-5) and list(answer) == ["bee"]


@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_labels_tickets_answer_only_when_somebody_says_which(run, kind):
    name = f"org/labels-{kind}"
    run(push_with_processor, name, kind, ticket_task="labels")
    with pytest.raises(ClientError, match="ValueError: `route_ids` is missing.*'ant', 'bee', 'cat'.*with_route"):
        run(ask, name, TASKS[kind])
    said = []
    for route in ("ant", "bee"):
        asked = run(ask, name, TASKS[kind], route=route)
        for answer, scores in asked:
            assert answer == pytest.approx(scores, rel=1e-5) and len(answer) == 4
        said.append(asked)
    assert said[0] != said[1]
