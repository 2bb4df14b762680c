"""The code that is saved with a model: its files, their imports, and the backbones for which it is saved."""

import ast
import json
import sys
from pathlib import Path

import pytest
from timm.models import create_model, register_model
from transformers import AutoModelForImageClassification
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import hf_rtl
from hf_rtl import RTLConfig, RTLModel, RTLModelForImageClassification, RTLModelForSequenceClassification
from hf_rtl.modeling.hub import backbone_packages


PACKAGE = Path(hf_rtl.modeling.__file__).parent
ALLOWED = {"huggingface_hub", "numpy", "safetensors", "timm", "torch", "transformers"}


def read_imports(file):
    """Imported modules of the package, and required packages outside the standard library."""
    own, others = set(), set()

    def visit(node):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            # transformers copies only files that it finds by `from .x import`.
            assert node.level == 1 and node.module and "." not in node.module, f"{file.name}: {ast.unparse(node)}"
            own.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others.update(alias.name.split(".")[0] for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return own, others - sys.stdlib_module_names


def carried_modules():
    """Name -> imported packages, of every module that `modeling_rtl` imports directly or indirectly."""
    found, to_do = {}, ["modeling_rtl"]
    while to_do:
        name = to_do.pop()
        if name not in found:
            own, found[name] = read_imports(PACKAGE / f"{name}.py")
            to_do += own
    return found


def test_modules_that_the_model_imports_lie_beside_it_and_need_no_other_package():
    modules = carried_modules()
    assert {"modeling_rtl", "routed_model", "mask_bank", "configuration_rtl", "hub"} <= modules.keys()
    assert {name: imported - ALLOWED for name, imported in modules.items() if imported - ALLOWED} == {}
    # transformers finds these files from the text alone.
    files = {Path(file) for file in get_relative_import_files(PACKAGE / "modeling_rtl.py")}
    assert files == {PACKAGE / f"{name}.py" for name in modules.keys() - {"modeling_rtl"}}
    for name in modules:
        assert set(get_imports(PACKAGE / f"{name}.py")) - sys.stdlib_module_names <= ALLOWED


@pytest.mark.slow
def test_code_is_saved_when_it_is_asked_for_and_no_class_is_changed(tiny_membership_model, tmp_path):
    tiny_membership_model.save_pretrained(tmp_path / "without")
    tiny_membership_model.save_pretrained(tmp_path / "with", with_code=True)
    files = {folder: {file.name for file in (tmp_path / folder).iterdir()} for folder in ("without", "with")}
    assert files["with"] - files["without"] == {f"{name}.py" for name in carried_modules()}
    for name in carried_modules():
        assert (tmp_path / "with" / f"{name}.py").read_bytes() == (PACKAGE / f"{name}.py").read_bytes()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("without", "with")]
    assert configs[1].pop("auto_map").keys() == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert configs[0] == configs[1]

    for saved in (tiny_membership_model, tiny_membership_model.config):
        assert saved._auto_class is None and type(saved)._auto_class is None
    assert not hasattr(tiny_membership_model.config, "auto_map")
    for loader in (RTLModel, AutoModelForImageClassification):
        loaded = loader.from_pretrained(tmp_path / "with")
        assert type(loaded) is RTLModelForImageClassification and not hasattr(loaded.config, "auto_map")
    loaded.save_pretrained(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == files["without"]


@pytest.mark.parametrize("name", ["modeling_rtl.RTLModel", "configuration_rtl.RTLConfig"])
def test_only_our_own_classes_may_be_named(tiny_membership_model, name):
    config = tiny_membership_model.config.to_dict()
    assert not hasattr(RTLConfig(**config, auto_map={"AutoModel": name}), "auto_map")
    module, class_name = name.split(".")
    for foreign in (
        f"org/name--{name}",
        f"evil.{class_name}",
        f"{module}.Evil",
        f"x{name}",
        f"{name}.x",
        [name],
        None,
    ):
        for auto_map in ({"AutoModel": foreign}, {"AutoConfig": name, "AutoModel": foreign}):
            with pytest.raises(ValueError, match="`config.auto_map` = "):
                RTLConfig(**config, auto_map=auto_map)
    with pytest.raises(ValueError, match="`config.auto_map` = "):
        RTLConfig(**config, auto_map=name)


# Backbones of other packages


@register_model
def stranger_to_timm(pretrained=False, **kwargs):
    """A network of timm's own layers, under a name that timm does not have."""
    return create_model("test_resnet", pretrained=pretrained, **kwargs)


def test_backbones_of_timm_and_transformers_need_no_other_package(tiny_vit_config, tiny_bert_config):
    routes = {"route_names": ["a", "b"], "ticket_task": "labels"}
    for name in ("test_resnet", "test_vit", tiny_vit_config):
        assert backbone_packages(RTLModelForImageClassification.from_backbone(name, **routes).backbone) == []
    assert (
        backbone_packages(RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **routes).backbone) == []
    )


@pytest.mark.parametrize(
    "backbone, package",
    [("ghostnet_rtl", "hf_rtl"), pytest.param("stranger_to_timm", "tests", id="stranger_to_timm-test_hub_code")],
)
def test_other_backbones_are_saved_without_code_and_it_is_said_why(tmp_path, caplog, backbone, package):
    model = RTLModelForImageClassification.from_backbone(backbone, route_names=["a"], ticket_task="labels")
    assert backbone_packages(model.backbone) == [package]
    model.save_pretrained(tmp_path / "model", with_code=True)
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert f"its backbone is of {package}" in caplog.text


def test_a_transformers_backbone_of_another_package_is_saved_without_code(tiny_attention_config, tmp_path, caplog):
    model = RTLModelForSequenceClassification.from_backbone(
        tiny_attention_config, route_names=["a"], ticket_task="labels"
    )
    model.save_pretrained(tmp_path / "model", with_code=True)
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert "its backbone is of" in caplog.text
