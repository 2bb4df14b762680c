"""`recipes/prune.py` pushes the model that it made, with its processor and its card."""

from tests.hub.clients.recipes import answers, prune_and_push


def test_one_command_prunes_retrains_and_pushes(hub, run):
    name = "org/resnet-rtl-cifar"
    run(prune_and_push, "resnet_cifar.yaml", name)
    files = hub.repos[name].at("main").files
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    # What names folders of this machine stays here.
    assert not {"data.json", "results.json", "report.html"} & set(files)
    card = files["README.md"].data.decode()
    assert "day" in card and "night" in card and "2 tickets" in card
    assert len(run(answers, name)) == 2
