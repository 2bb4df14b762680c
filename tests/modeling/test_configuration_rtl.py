"""The fields of a configuration that survive a file, and the names that a configuration may not have."""

import copy
import json
import os
import pickle
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    LlavaConfig,
    TimmWrapperConfig,
    ViTConfig,
)

import hf_rtl
from hf_rtl import (
    RTLConfig,
    RTLModel,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSequenceClassification,
)


LABELS = ["bus", "car", "cat", "cow", "dog", "owl", "pig"]
ONE_LOGIT = {"num_labels": 1, "problem_type": "multi_label_classification"}


def bert_dict(**fields_) -> dict:
    return {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **fields_}


def timm_dict(**fields_) -> dict:
    return {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 3, **fields_}


def make(backbone_config, ticket_task="labels", route_names=("a", "b"), **fields_) -> RTLConfig:
    return RTLConfig(
        backbone_config=backbone_config, ticket_task=ticket_task, route_names=list(route_names), **fields_
    )


# Opened files and connections


_WATCHED = {
    "open",
    "os.listdir",
    "os.scandir",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "urllib.Request",
}
_recorded: list[tuple[str, str]] | None = None


def _record(event: str, arguments: tuple) -> None:
    if _recorded is not None and event in _WATCHED:
        _recorded.append((event, str(arguments[0])))


sys.addaudithook(_record)  # The hook cannot be removed; `_recorded` switches it.


@contextmanager
def watched():
    """Everything that Python opens or connects to within the block, as (event, path or address)."""
    global _recorded
    _recorded = events = []
    try:
        yield events
    finally:
        _recorded = None


# The files of the interpreter and of libraries, which lazy imports read.
_PACKAGES = tuple(
    os.path.realpath(path) + os.sep
    for path in (sys.prefix, sys.base_prefix, Path(transformers.__file__).parents[1], Path(hf_rtl.__file__).parent)
)


def outside(events, *allowed: Path) -> list[tuple[str, str]]:
    """The events on files other than those of libraries and the `allowed` ones."""
    allowed_paths = {os.path.realpath(path) for path in allowed}

    def harmless(event: str, path: str) -> bool:
        path = os.path.realpath(path)
        return event in ("open", "os.listdir", "os.scandir") and (
            path in allowed_paths or f"{path}{os.sep}".startswith(_PACKAGES)
        )

    return [(event, path) for event, path in events if not harmless(event, path)]


def test_the_watch_sees_files_and_connections(tmp_path):
    import socket

    (tmp_path / "file").write_text("x")
    with watched() as events, pytest.raises(Exception):  # noqa: B017 - refused by pytest-socket
        (tmp_path / "file").read_text()
        os.listdir(tmp_path)
        socket.getaddrinfo("huggingface.co", 443)
        socket.create_connection(("127.0.0.1", 1))
    assert ("open", str(tmp_path / "file")) in outside(events)
    assert ("os.listdir", str(tmp_path)) in outside(events)
    assert any(event.startswith("socket.") for event, _ in outside(events))
    assert not outside([("open", str(tmp_path / "file"))], tmp_path / "file")
    assert outside([("socket.connect", timm.__file__)])
    assert not outside([("open", timm.__file__), ("open", hf_rtl.__file__), ("open", os.__file__)])


# Round trips


def test_every_field_survives_a_file(tmp_path):
    backbone_config = TimmWrapperConfig(
        architecture="test_resnet",
        model_args={"in_chans": 1, "drop_rate": 0.25},
        initializer_range=0.05,
        do_pooling=False,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        problem_type="single_label_classification",
    )
    config = make(
        backbone_config,
        route_names=["zebra", "aardvark", "10", "9"],  # in no sorted order
        norm_statistics="shared",
        prunable=[("b.weight", (3, 2)), ("a.weight", [4, 1, 2, 2])],
        prune_include=["b*"],
        prune_exclude=["*.c", "*.d"],
        private_parameters=["c.bias", "d.bias"],
        router="centroid",
        router_features=17,
        router_threshold=0.25,
        router_fallback="aardvark",
        thresholds=[0.5, -1.25, 0.1, 1e-7],
        mask_fingerprint="f" * 64,
        base={"fingerprint": {"float32": "0" * 16}, "repo": "org/name", "revision": "1" * 40},
        added_routes=["9"],
        compact={"compact.union": "raw"},
        mask_cache_bytes=12345,
        compute="small",
        hf_rtl_version="9.9",
        architectures=["RTLModelForImageClassification"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    loaded = RTLConfig.from_pretrained(tmp_path)
    assert type(loaded) is RTLConfig
    default = make(bert_dict())
    same_as_default = {"ticket_task", "format_version"}
    for field in fields(RTLConfig):
        if field.name in ("backbone_config", "transformers_version"):
            continue
        assert getattr(loaded, field.name) == getattr(config, field.name), field.name
        if field.name in RTLConfig.__dict__.get("__annotations__", {}) and field.name not in same_as_default:
            assert getattr(loaded, field.name) != getattr(default, field.name), f"{field.name} tests nothing"
    assert type(loaded.backbone_config) is TimmWrapperConfig
    assert loaded.backbone_config.to_dict() == backbone_config.to_dict()
    assert loaded.prunable == [("b.weight", [3, 2]), ("a.weight", [4, 1, 2, 2])]
    assert loaded.num_routes == 4 and loaded.num_labels == 7
    assert loaded.problem_type == "single_label_classification"
    # Saving again, dictionaries and copies change nothing.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    for other in (
        RTLConfig.from_dict(config.to_dict()),
        RTLConfig(**config.to_dict()),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        of_this_file = {"transformers_version": None, "_name_or_path": None}
        assert other.to_dict() | of_this_file == config.to_dict() | of_this_file


@pytest.mark.parametrize("router", ["given", "score"])
def test_choices_survive(tmp_path, router):
    config = make(bert_dict(**ONE_LOGIT), ticket_task="membership", router=router)
    config.save_pretrained(tmp_path)
    loaded = RTLConfig.from_pretrained(tmp_path)
    assert (loaded.ticket_task, loaded.router, loaded.norm_statistics) == ("membership", router, "per_route")
    assert loaded.problem_type == "multi_label_classification"
    assert loaded.id2label == {0: "a", 1: "b"} and loaded.label2id == {"a": 0, "b": 1} and loaded.num_labels == 2
    assert loaded.backbone_config.num_labels == 1
    assert loaded.backbone_config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("num_labels", [1, 2, 7])
def test_the_number_of_labels_of_a_timm_backbone_survives(tmp_path, num_labels):
    """The nested configurations of transformers reset it to 2."""
    names = LABELS[:num_labels]
    config = make(TimmWrapperConfig(architecture="test_resnet", id2label=dict(enumerate(names))))
    config.save_pretrained(tmp_path)
    loaded = RTLConfig.from_pretrained(tmp_path)
    assert loaded.num_labels == loaded.backbone_config.num_labels == num_labels
    assert loaded.id2label == loaded.backbone_config.id2label == dict(enumerate(names))
    assert loaded.label2id == {name: index for index, name in enumerate(names)}


def test_labels_of_ten_and_more_stay_in_order(tmp_path):
    names = [f"label {index}" for index in range(12)]
    config = make(BertConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}))
    config.save_pretrained(tmp_path)
    assert "label 11" in (tmp_path / "config.json").read_text()
    assert RTLConfig.from_pretrained(tmp_path).id2label == dict(enumerate(names))


def test_a_file_holds_no_name_of_a_repo(tmp_path):
    backbone_config = BertConfig(name_or_path="someone/somewhere")
    backbone_config.auto_map = None
    config = make(backbone_config)
    config.save_pretrained(tmp_path)
    assert "someone" not in (tmp_path / "config.json").read_text()
    assert "someone" not in str(config.to_dict())


def test_a_file_holds_the_whole_backbone(tmp_path):
    """Default values are saved too, since other versions of transformers may have other defaults."""
    config = make(BertConfig(hidden_size=16))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    assert saved == json.loads(json.dumps(config.to_dict()["backbone_config"]))
    assert set(BertConfig().to_dict()) - set(saved) == {"transformers_version", "_name_or_path"}
    assert saved["layer_norm_eps"] == 1e-12 and saved["hidden_size"] == 16


def test_a_configuration_does_not_change_the_backbones():
    """If the attention implementation were reset, attention would silently be computed differently."""
    for implementation in ("sdpa", "eager", None):
        backbone_config = ViTConfig(attn_implementation=implementation)
        before = backbone_config.to_dict()
        config = make(backbone_config)
        assert config.backbone_config is backbone_config
        assert backbone_config._attn_implementation == implementation
        assert backbone_config.to_dict() == before
    given = make(ViTConfig(attn_implementation="sdpa"), attn_implementation="eager")
    assert given._attn_implementation == given.backbone_config._attn_implementation == "eager"


# Contradictions


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ticket_task": None}, "`ticket_task` must be one of 'membership', 'labels', got None"),
        ({"ticket_task": "both"}, "`ticket_task` must be one of .* got 'both'"),
        ({"norm_statistics": "per-route"}, "`norm_statistics` must be one of 'per_route', 'shared', got 'per-route'"),
        ({"router": "psychic"}, "`router` must be one of 'given', 'score', 'centroid', 'entropy', got 'psychic'"),
        ({"router": ["given"]}, "`router` must be one of"),
        ({"route_names": None}, "`route_names` is empty"),
        ({"route_names": []}, "`route_names` is empty"),
        ({"route_names": ["a", "a"]}, "`route_names` has 'a' more than once"),
        ({"route_names": "ab"}, "`route_names` must be a list"),
        ({"backbone_config": None}, "`backbone_config` must be a configuration or a dict .* got NoneType"),
        ({"backbone_config": "resnet18"}, "got str; .*from_backbone"),
        ({"backbone_config": {}}, "`backbone_config` has model_type=None"),
        ({"router": "centroid"}, "`router_features` = None with `router` = 'centroid'"),
        ({"router": "score", "router_features": 4}, "`router_features` = 4 with `router` = 'score'"),
        (
            {"router": "entropy", "ticket_task": "membership", "backbone_config": bert_dict(**ONE_LOGIT)},
            "'entropy' compares outputs over several labels",
        ),
        ({"router_threshold": -0.1}, r"`router_threshold` must be a probability in \[0, 1\], got -0.1"),
        ({"router_fallback": "c"}, "`router_fallback` must be None, for the union of all tickets, or one of 'a', 'b'"),
        ({"thresholds": [0.5]}, "`thresholds` has 1 values, expected one per route, 2"),
    ],
)
def test_bad_fields(changes, message):
    arguments = {"backbone_config": bert_dict(), "ticket_task": "labels", "route_names": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        RTLConfig(**{**arguments, **changes})


def test_membership_needs_two_routes_and_one_logit():
    make(bert_dict(**ONE_LOGIT), "membership", ["a", "b"])
    with pytest.raises(ValueError, match="at least two routes"):
        make(bert_dict(**ONE_LOGIT), "membership", ["a"])
    with pytest.raises(ValueError, match="one logit, got num_labels=2"):
        make(bert_dict(problem_type="multi_label_classification"), "membership")
    with pytest.raises(ValueError, match="(?s)problem_type='multi_label_classification'.*got None"):
        make(bert_dict(num_labels=1), "membership")
    with pytest.raises(ValueError, match="got 'regression'"):
        make(bert_dict(num_labels=1, problem_type="regression"), "membership")
    assert make(bert_dict(), "labels", ["only"]).num_routes == 1


@pytest.mark.parametrize(
    "labels",
    [
        {"num_labels": 9},
        {"num_labels": 2},
        {"id2label": {0: "x", 1: "y", 2: "z"}},
        {"id2label": {0: "LABEL_0"}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "num_labels": 9},
    ],
)
def test_labels_that_contradict_the_backbones(labels):
    for backbone_config in (bert_dict(num_labels=3), timm_dict()):
        with pytest.raises(
            ValueError, match=r"follow the backbone's labels: expected 3.*from_backbone\(…, num_labels=3"
        ):
            make(backbone_config, **labels)
    with pytest.raises(ValueError, match=r"follow the route names: expected 4"):
        make(bert_dict(**ONE_LOGIT), "membership", ["a", "b", "c", "d"], **labels)


@pytest.mark.parametrize(
    "labels", [{}, {"num_labels": 3}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}]
)
def test_labels_that_agree(labels):
    assert make(timm_dict(), **labels).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_labels_changed_afterwards():
    config = make(bert_dict(**ONE_LOGIT), "membership", ["a", "b", "c"])
    config.check()
    config.num_labels = 9
    with pytest.raises(ValueError, match="expected 3 .* got"):
        config.check()
    with pytest.raises(ValueError, match="expected 3 .* got"):
        RTLModelForSequenceClassification(config)


@pytest.mark.slow
def test_loading_with_another_number_of_labels(tmp_path, tiny_labels_model, tiny_membership_model):
    for model, own in ((tiny_labels_model, 4), (tiny_membership_model, 3)):
        model.save_pretrained(tmp_path)
        for load in (RTLModel, RTLModelForImageClassification, RTLConfig):
            with pytest.raises(ValueError, match=f"expected {own} .*got 9"):
                load.from_pretrained(tmp_path, num_labels=9)
        with pytest.raises(ValueError, match=f"expected {own} .*got|wrong sizes of 2 .*an argument has changed"):
            RTLModel.from_pretrained(tmp_path, id2label={0: "x"})
        with pytest.raises(ValueError, match=f"expected {own} .*got 9"):
            RTLModel.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
        assert RTLModel.from_pretrained(tmp_path, num_labels=own).config.num_labels == own


# Names of files, repositories and code outside the file

AUTO_MAP = {"AutoModel": "someone/repo--modeling.Evil"}


def at(path: str, value):
    """A change that sets the entry at a dotted path to `value`, and makes missing dictionaries."""

    def change(config: dict, folder: Path) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config.setdefault(key, {})
        config[last] = value(folder) if callable(value) else value

    change.__name__ = f"{path} = {'…' if callable(value) else value}"
    return change


OUTSIDE_NAMES = [
    # (a change of a configuration with a timm backbone, the name in the error)
    *(
        (at("backbone_config.architecture", name), "backbone_config.architecture")
        for name in (
            "hf-hub:someone/repo",
            "hf_hub:someone/repo",
            "someone/repo",
            "timm/resnet18.a1_in1k",
            "local-dir:/tmp/x",
            "./test_resnet",
            "test_resnet.tag",
            "test_resnet ",
            "no_such_network",
            "",
            None,
            7,
            ["test_resnet"],
        )
    ),
    (at("backbone_config.architecture", lambda folder: f"local-dir:{folder}"), "backbone_config.architecture"),
    (at("backbone_config.architecture", lambda folder: str(folder)), "backbone_config.architecture"),
    (
        at("backbone_config.model_args.checkpoint_path", lambda folder: f"{folder}/weights.pt"),
        "model_args.checkpoint_path",
    ),
    (at("backbone_config.model_args.checkpoint_path", ""), "model_args.checkpoint_path"),
    (at("backbone_config.model_args.pretrained", True), "model_args.pretrained"),
    (at("backbone_config.model_args.pretrained_cfg", "hf-hub:someone/repo"), "model_args.pretrained_cfg"),
    (at("backbone_config.model_args.pretrained_cfg_overlay", {"file": "x"}), "model_args.pretrained_cfg_overlay"),
    (at("backbone_config.model_args.pretrained_strict", False), "model_args.pretrained_strict"),
    (at("backbone_config.model_args.cache_dir", "/tmp"), "model_args.cache_dir"),
    (at("backbone_config.model_args.scriptable", True), "model_args.scriptable"),
    (at("backbone_config.model_args.exportable", True), "model_args.exportable"),
    (at("backbone_config.model_args", [["checkpoint_path", "x"]]), "`backbone_config.model_args` must be a dict"),
    (at("backbone_config.backbone", "resnet18"), "backbone_config.backbone"),
    (at("backbone_config.use_pretrained_backbone", True), "use_pretrained_backbone"),
    (at("backbone_config.use_timm_backbone", True), "use_timm_backbone"),
    (at("backbone_config.quantization_config", {"quant_method": "bitsandbytes"}), "quantization_config"),
    (at("backbone_config.auto_map", AUTO_MAP), "backbone_config.auto_map"),
    (at("backbone_config.one.two.auto_map", AUTO_MAP), "backbone_config.one.two.auto_map"),
    (at("backbone_config.one", [{"two": [{"auto_map": AUTO_MAP}]}]), r"backbone_config.one\[0\].two\[0\].auto_map"),
    (at("backbone_config.vision_config.backbone", "resnet18"), "vision_config.backbone"),
    (at("backbone_config.attn_implementation", "someone/kernel"), "backbone_config.attn_implementation"),
    (at("backbone_config._attn_implementation", "someone/kernel:fast"), "backbone_config._attn_implementation"),
    (at("backbone_config._attn_implementation_internal", "someone/kernel"), "_attn_implementation_internal"),
    (at("backbone_config.attn_implementation", {"": "someone/kernel"}), "backbone_config.attn_implementation"),
    (at("backbone_config.attn_implementation", "paged|someone/kernel@v1:fast"), "backbone_config.attn_implementation"),
    (at("backbone_config.experts_implementation", "someone/kernel"), "backbone_config.experts_implementation"),
    (at("backbone_config.text_config.attn_implementation", "someone/kernel"), "text_config.attn_implementation"),
    (at("backbone_config.model_type", "rtl"), "model_type='rtl'"),
    (at("backbone_config.model_type", "someones_model"), "model_type='someones_model'"),
    (at("backbone_config.model_type", None), "model_type=None"),
    (at("backbone_config.model_type", ["bert"]), r"model_type=\['bert'\]"),
    (at("backbone_config.vision_config.model_type", "rtl"), "vision_config` has model_type='rtl'"),
    (at("backbone_config.one.vision_config.model_type", "someones"), "one.vision_config` has model_type='someones'"),
    (
        at("backbone_config.vision_config", {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/repo"}),
        "vision_config.architecture",
    ),
    (
        at("backbone_config.vision_config", timm_dict(model_args={"checkpoint_path": "x"})),
        "vision_config.model_args.checkpoint_path",
    ),
    (at("backbone_config.vision_config.architecture", "someone/repo"), "vision_config.architecture"),
    # Entries of the file itself.
    (at("auto_map", AUTO_MAP), "config.auto_map"),
    (at("extra.auto_map", AUTO_MAP), "config.extra.auto_map"),
    (at("backbone", "resnet18"), "config.backbone"),
    (at("use_pretrained_backbone", True), "config.use_pretrained_backbone"),
    (at("use_timm_backbone", True), "config.use_timm_backbone"),
    (at("attn_implementation", "someone/kernel"), "config.attn_implementation"),
    (at("_attn_implementation", "someone/kernel"), "config._attn_implementation"),
    (at("attn_implementation", {"backbone_config": "someone/kernel"}), "config.attn_implementation"),
    (at("experts_implementation", "someone/kernel"), "config.experts_implementation"),
]


@pytest.fixture(scope="module")
def saved_configuration(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("saved")
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b"], ticket_task="labels", num_labels=3, drop_rate=0.0
    )
    model.config.architectures = ["RTLModelForImageClassification"]
    model.config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("change, message", OUTSIDE_NAMES, ids=lambda value: getattr(value, "__name__", ""))
def test_names_of_things_outside_the_file_are_refused_unopened(tmp_path, saved_configuration, change, message):
    config = copy.deepcopy(saved_configuration)
    change(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Files that a careless loader would open.
    for name in ("model.safetensors", "weights.pt", "modeling.py", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"never read")
    with watched() as events, pytest.raises(ValueError, match=message):
        RTLConfig(**copy.deepcopy(config))
    assert outside(events) == []
    for load in (RTLModel, RTLModelForImageClassification, RTLConfig, AutoModelForImageClassification):
        if "quantization" in message and load is AutoModelForImageClassification:
            continue
        with watched() as events, pytest.raises(ValueError, match=message):
            load.from_pretrained(tmp_path)
        assert outside(events, tmp_path / "config.json", "/proc/mounts") == [], load.__name__
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]


def test_a_quantization_is_refused_unopened(tmp_path, saved_configuration):
    config = {**saved_configuration, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ValueError, match="config.quantization_config"):
        RTLConfig(**config)


@pytest.mark.parametrize("value", [object(), print, {1: 2}, [object()], {"x": {1}}, torch.float32])
def test_arguments_of_timm_are_plain_values(value):
    with pytest.raises(ValueError, match="backbone_config.model_args.x` must be a plain JSON value"):
        make(timm_dict(model_args={"x": value}))
    make(timm_dict(model_args={"x": [1, 2.5, "three", None, True, {"four": [4]}]}))


def test_configurations_made_in_python_are_checked_as_well():
    with pytest.raises(ValueError, match="backbone_config.architecture"):
        make(TimmWrapperConfig(architecture="hf-hub:someone/repo"))
    with pytest.raises(ValueError, match="vision_config.architecture"):
        make(LlavaConfig(vision_config=TimmWrapperConfig(architecture="hf-hub:someone/repo")))
    with pytest.raises(ValueError, match="vision_config.architecture"):
        make({"model_type": "llava", "vision_config": TimmWrapperConfig(architecture="hf-hub:someone/repo")})
    config = BertConfig()
    config.auto_map = AUTO_MAP
    with pytest.raises(ValueError, match="auto_map"):
        make(config)
    with pytest.raises(ValueError, match="model_type='rtl'"):
        make(make(bert_dict()))


def test_harmless_names_pass():
    """A nested configuration with parts of known types, and keys without a value."""
    nested = {"model_type": "llava", "vision_config": timm_dict(), "text_config": bert_dict(), "backbone": None}
    config = make({**nested, "use_pretrained_backbone": False, "auto_map": {}, "attn_implementation": "eager"})
    assert config.backbone_config.vision_config.architecture == "test_resnet"
    make(LlavaConfig())


@pytest.mark.slow
def test_a_good_folder_is_all_that_loading_opens(tmp_path, tiny_labels_model, tiny_bert_config):
    text_model = RTLModelForMaskedLM.from_backbone(tiny_bert_config, route_names=["a"], ticket_task="labels")
    for name, model in (("image", tiny_labels_model), ("text", text_model)):
        model.save_pretrained(tmp_path / name)
        files = list((tmp_path / name).iterdir())
        auto_class = AutoModelForImageClassification if name == "image" else AutoModelForMaskedLM
        for load in (RTLModel, type(model), auto_class):
            with watched() as events:
                loaded = load.from_pretrained(tmp_path / name)
            assert type(loaded) is type(model)
            assert events and outside(events, *files, tmp_path / name, "/proc/mounts") == []


# Versions and routes


def test_files_of_a_newer_format_are_refused_before_anything_else(tmp_path):
    config = make(bert_dict())
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["format_version"] == 1
    # Other entries may have another meaning in a newer format.
    newer = {**saved, "format_version": 99, "hf_rtl_version": "7.0", "ticket_task": "something new"}
    for version in (99, "2", None, 1.5):
        file.write_text(json.dumps({**newer, "format_version": version}))
        with pytest.raises(
            ValueError, match=f"saved by hf_rtl 7.0 in format {version!r}; .* reads formats up to 2. Upd"
        ):
            RTLConfig.from_pretrained(tmp_path)
    # Files without a format version.
    saved.pop("format_version")
    file.write_text(json.dumps(saved))
    assert RTLConfig.from_pretrained(tmp_path).format_version == 1


def test_other_routes_bring_other_labels():
    config = make(bert_dict(**ONE_LOGIT), "membership", thresholds=[1.0, 2.0], added_routes=["b"])
    config.change_routes(["b", "c", "d"], [2.0, 0.0, 3.0])
    assert config.id2label == {0: "b", 1: "c", 2: "d"} and config.label2id == {"b": 0, "c": 1, "d": 2}
    assert (config.num_labels, config.num_routes, config.added_routes) == (3, 3, ["b"])
    config.change_routes(["c", "d"], None)
    assert config.added_routes == [] and config.thresholds is None
    before = config.to_dict()
    for routes, thresholds, message in (
        (["c"], None, "needs at least two routes"),
        (["c", "c"], None, "more than once"),
        (["c", "d"], [1.0], "has 1 values, expected one per route, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            config.change_routes(routes, thresholds)
        assert config.to_dict() == before


@pytest.mark.parametrize(
    "fields_, message",
    [
        ({"added_routes": ["z"]}, r"`added_routes` = \['z'\] are not all among the routes \['a', 'b'\]"),
        ({"base": {"repo": "org/name"}}, "`base` must be None or have a dict `fingerprint`"),
    ],
)
def test_bad_entries_of_the_base_are_refused(fields_, message):
    with pytest.raises(ValueError, match=message):
        make(bert_dict(), **fields_)


@pytest.mark.parametrize("content", ["null", "5", "[]", "[[]]", "9" * 5000, "[" * 10**5 + "]" * 10**5])
def test_a_file_that_holds_no_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}|config.json"):
        RTLConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prunable": 5}, "`prunable` must be a list of names and shapes"),
        ({"prunable": [["a", [1, 2], 3]]}, "`prunable` must be"),
        ({"prunable": [["a", [1, -2]]]}, "`prunable` must be"),
        ({"prunable": [["a", [1.0]]]}, "`prunable` must be"),
        ({"prunable": [["a", [2**63, 0]]]}, "`prunable` must be"),
        ({"prunable": [["a", [2**40, 2**40]]]}, "`prunable` must be"),
        ({"prunable": [[None, [1]]]}, "`prunable` must be"),
        ({"thresholds": 5}, "`config.json` cannot be used: `thresholds`"),
        ({"num_labels": 2**40}, r"`config.num_labels` = \d+ is more than 1,000,000 labels"),
        ({"id2label": 5}, "`config.json` cannot be used: `id2label`"),
        ({"id2label": {"x": "y"}}, "`config.json` cannot be used: .*invalid literal"),
    ],
)
def test_a_field_that_is_damaged_is_named(tmp_path, tiny_vit_config, fields, message):
    config = RTLConfig(backbone_config=tiny_vit_config, route_names=["x"], ticket_task="labels", prunable=[["a", [2]]])
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        RTLConfig.from_pretrained(tmp_path)


def test_a_field_of_the_backbone_that_is_damaged_is_named(tmp_path, tiny_vit_config):
    config = RTLConfig(backbone_config=tiny_vit_config, route_names=["x"], ticket_task="labels", prunable=[["a", [2]]])
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    for name in ("num_labels", "num_classes"):
        many = {**saved, "backbone_config": {**saved["backbone_config"], name: 2**40}}
        file.write_text(json.dumps(many))
        with pytest.raises(ValueError, match=f"`backbone_config.{name}` = .* is more than 1,000,000 labels"):
            RTLConfig.from_pretrained(tmp_path)
    for value in (None, "x", [1]):
        saved["backbone_config"]["hidden_size"] = value
        file.write_text(json.dumps(saved))
        with pytest.raises(ValueError, match="`backbone_config` is no configuration of a 'vit': .*hidden_size"):
            RTLConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("architectures", True, "a list of strings"),
        ("architectures", [{"a": 1}], "a list of strings"),
        ("dtype", True, "a string"),
        ("mask_cache_bytes", {}, "a number from 0"),
        ("mask_cache_bytes", -1, "a number from 0"),
        ("router_threshold", float("nan"), "a number"),
        ("thresholds", [None], "a list of numbers"),
        ("compact", [], "a dict"),
        ("prune_include", "x" * 10**5, "a list of strings"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, tiny_vit_config, name, value, kind):
    config = RTLConfig(backbone_config=tiny_vit_config, route_names=["x"], ticket_task="labels", prunable=[["a", [2]]])
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"`{name}` in `config.json` must be {kind}, got .") as raised:
        RTLConfig.from_pretrained(tmp_path)
    assert len(str(raised.value)) < 400
