"""The card of a routed model: `README.md`, and beside it a picture of the similarity of its tickets."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData

from ..data.rules import load_rule
from ..modeling.files import write_bytes
from ..modeling.hub import CARD_FILE
from ..modeling.modeling_rtl import RTLModel
from .page import HUB_METRICS, backbone_name, describe_metric, list_results, render_page
from .readme import ALL_ROUTES_LABEL, Readme
from .run_record import ARGUMENTS_FILE, copy_run, read_run, was_trained_by


logger = logging.getLogger(__name__)

PICTURE_FILE = "similarity.png"

TAGS = ["hf_rtl", "pruning", "sparsity", "lottery-ticket"]
# The Hub's names of tasks. Sequence-to-sequence models have none, because transformers has no pipeline for them.
PIPELINE_TAGS = {
    transformers.AutoModelForImageClassification: "image-classification",
    transformers.AutoModelForSemanticSegmentation: "image-segmentation",
    transformers.AutoModelForAudioClassification: "audio-classification",
    transformers.AutoModelForSequenceClassification: "text-classification",
    transformers.AutoModelForTokenClassification: "token-classification",
    transformers.AutoModelForMaskedLM: "fill-mask",
    transformers.AutoModelForCausalLM: "text-generation",
}
_TASK_NAMES = {
    "membership": "Is this mine? A ticket against all other samples",
    "labels": "Labels, given the route",
}
# Keys of the metadata, in the order in which they are written.
_ORDER = [
    *("language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model"),
    *("datasets", "tags", "metrics", "model-index"),
]
# Fields that may have several values.
_LISTS = ("base_model", "datasets", "language", "tags", "authors", "limitations")


@dataclass
class RTLCardData:
    """
    The fields of a card that only the author of a model knows; all are optional. The rest of a card comes from the run
    and from the model.

    Args:
        model_id (`str`): repository on the Hub, for example `"org/name"`, for the examples of the card.
        model_name (`str`): title of the card. Defaults to the name in `model_id`.
        description (`str`): Markdown, placed after the first lines.
        language, license, license_name, license_link, datasets, base_model, tags, pipeline_tag: the same as in the
            metadata of any model card. `base_model` defaults to the repository that the run took its backbone from.
        dataset_name (`str`), dataset_config (`str`), dataset_split (`str`), dataset_revision (`str`): the data that
            the metrics were measured on.
        authors (`list[str]`), citation (`str`, BibTeX), limitations (`list[str]`, Markdown): text of the card.

    Raises:
        TypeError: a value that is neither a string nor, where several values make sense, a list of strings.
    """

    model_id: str | None = None
    model_name: str | None = None
    description: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | list[str] | None = None
    datasets: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dataset_revision: str | None = None
    tags: str | list[str] | None = None
    pipeline_tag: str | None = None
    authors: str | list[str] | None = None
    citation: str | None = None
    limitations: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            values = value if isinstance(value, list) and name in _LISTS else [value]
            if not all(isinstance(entry, str) for entry in values):
                allowed = "a string or a list of strings" if name in _LISTS else "a string"
                raise TypeError(f"`{name}` must be {allowed}, got {value!r}.")

    def given(self) -> dict[str, Any]:
        """The fields that are not `None`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def updated(self, given: Mapping[str, Any]) -> RTLCardData:
        """A copy with other values of the `given` fields. Raises `TypeError` for an unknown one; names the closest."""
        allowed = [field.name for field in fields(self)]
        for name in given:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean `{close[0]}`?" if close else "."
                raise TypeError(f"`{name}` is no field of a card{hint} Allowed are {', '.join(allowed)}.")
        return replace(self, **given)


def write_card(
    source: RTLModel | str | Path, folder: str | Path | None = None, *, remote: bytes | None = None, **given: Any
) -> Path:
    """
    Writes the model card of a model: `README.md`, and `similarity.png` if matplotlib is installed. Uses no network.

    In an existing `README.md` only the generated part is replaced; if there is none, it is added at the end. All other
    text stays byte for byte, and so does metadata that was changed by hand. Repeating a call changes nothing.

    Args:
        source ([`RTLModel`], `str` or `Path`): the model, or the folder that it is saved in. Facts about training come
            from `training_run.json` in the folder, which `RTLTrainer` writes, or from `model.training_run`.
        folder (`str` or `Path`, *optional*): the folder to write into. Defaults to `source`, if that is a folder.
        remote (`bytes`, *optional*): for a card to push, the content of the card on the Hub, `b""` if there is none.
            Its text and metadata are kept, unless only the file was changed by hand since the last push.
        **given: fields of [`RTLCardData`], for example `license="mit"`. The file keeps those of earlier calls.

    Returns:
        `Path`: the written `README.md`.

    Raises:
        TypeError: a field is unknown, or a value has a wrong type.
        ValueError: `folder` is missing, it holds no model, the metadata of `README.md` cannot be read, or both the
            file and the card on the Hub were changed by hand. Nothing is written.
    """
    RTLCardData().updated(given)
    model, run, saved, target = _open_source(source, folder)
    file = target / CARD_FILE
    readme = _to_change(file, remote)
    noted = readme.record or {}
    try:
        card = RTLCardData().updated({**noted.get("given", {}), **given})
    except TypeError as error:
        raise ValueError(
            f"the mark `hf_rtl: begin` in {str(file)!r} is damaged: {error} Delete it, and all up to the next one."
        ) from error
    metadata = card_metadata(model, card, run)
    merged = readme.merged(metadata)
    for name in sorted(given.keys() & metadata.keys()):
        if not isinstance(metadata[name], list) and merged.get(name) != metadata[name]:
            logger.warning(
                f"`{name}` = {given[name]!r} is not written: in {str(file)!r} it was changed by hand to "
                f"{merged.get(name)!r}; change it there."
            )
    similarity = model.mask_bank.similarity().cpu()
    has_picture = find_spec("matplotlib") is not None
    page = render_page(
        model,
        asdict(card),
        run,
        similarity=similarity,
        pipeline_tag=metadata.get("pipeline_tag"),
        title=None if readme.has_title else _title(model, card),
        with_code=_has_code(saved),
        with_arguments=(saved / ARGUMENTS_FILE).exists(),
        rule=_rule(saved, model),
        picture=PICTURE_FILE if has_picture else None,
    )
    noted_metadata = {name: value for name, value in metadata.items() if name != "model-index"}
    note: dict[str, Any] = {"given": card.given(), "metadata": noted_metadata}
    note |= {"pushed": noted["pushed"]} if "pushed" in noted else {}
    content = readme.with_generated(page, merged, note)
    if remote is not None:
        note["pushed"] = Readme.parse(content).own_part()
        content = readme.with_generated(page, merged, note)
    if has_picture:
        from ..plots import similarity_heatmap

        chance = model.mask_bank.chance_similarity()
        similarity_heatmap(similarity, model.route_names, target / PICTURE_FILE, chance=chance)
    write_bytes(file, content)
    return file


def check_card(model: RTLModel, run: Mapping[str, Any]) -> None:
    """Makes the card of a model and a run without writing it. Raises what `write_card` would raise of their values."""
    card, similarity = RTLCardData(), model.mask_bank.similarity().cpu()
    metadata = card_metadata(model, card, run)
    render_page(model, asdict(card), run, similarity=similarity, pipeline_tag=metadata.get("pipeline_tag"))


def write_pushed_card(
    model: RTLModel,
    folder: Path,
    *,
    repo_id: str,
    remote: bytes,
    tags: list[str] | None,
    token: bool | str | None,
) -> None:
    """
    Writes into `folder` the card of a model that will be pushed, and the record of its run; see [`write_card`] and
    `copy_run`. Uses the network only to read the repository that the model was loaded from.
    """
    copy_run(model, folder, token=token)
    write_card(model, folder, remote=remote, model_id=repo_id, **({"tags": tags} if tags else {}))


def _to_change(file: Path, remote: bytes | None) -> Readme:
    """The card whose text and metadata are kept: the one that was changed by hand, in `file` or on the Hub."""
    mine = Readme.parse(file.read_bytes() if file.exists() else b"")
    if not remote:
        return mine
    theirs = Readme.parse(remote)
    if not mine.is_edited or mine.own_part() == theirs.own_part():
        return theirs
    # Compared with `mine.last_pushed`, not theirs: another push may have recorded a hand edit that mine lacks.
    if theirs.own_part() != mine.last_pushed:
        raise ValueError(
            f"both {str(file)!r} and the model card on the Hub were changed by hand. Copy the text to keep into that "
            "on the Hub and delete the file, or make both the same."
        )
    return mine


def card_metadata(model: RTLModel, card: RTLCardData, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The YAML part of a card: given fields, facts of the model, and results over all routes and of the worst."""
    pipeline_tag = card.pipeline_tag or PIPELINE_TAGS.get(model.backbone_class)
    results = list(_eval_results(model, card, run, pipeline_tag or "other"))
    data = ModelCardData(
        language=card.language,
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        library_name="transformers",
        tags=[*TAGS, *(model.model_tags or []), *_listed(card.tags)],
        datasets=_listed(card.datasets) or None,
        metrics=sorted({result.metric_type for result in results} & HUB_METRICS) or None,
        base_model=card.base_model or (run["backbone"] if run else None),
        pipeline_tag=pipeline_tag,
        model_name=_title(model, card) if results else None,
        eval_results=results or None,
    ).to_dict()
    return {name: data[name] for name in _ORDER if name in data}


def _eval_results(
    model: RTLModel, card: RTLCardData, run: Mapping[str, Any] | None, task: str
) -> Iterator[EvalResult]:
    """Yields the results of the last round for the Hub."""
    datasets = _listed(card.datasets)
    ticket_task = model.config.ticket_task
    for evaluation in run["evaluations"] if run else []:
        # The Hub identifies a result by its configuration, so it names the evaluation set.
        config = ", ".join(part for part in (card.dataset_config, evaluation["name"], ALL_ROUTES_LABEL) if part)
        found = list_results(evaluation["rounds"][-1], model.route_names, ticket_task=ticket_task)
        for name, value in found.items():
            kind, words = describe_metric(name, ticket_task=ticket_task, overall=True)
            yield EvalResult(
                task_type=task,
                task_name=_TASK_NAMES[ticket_task],
                dataset_type=datasets[0] if datasets else "unknown",
                dataset_name=card.dataset_name or (datasets[0] if datasets else "not named"),
                dataset_config=config,
                dataset_split=card.dataset_split,
                dataset_revision=card.dataset_revision,
                metric_type=kind,
                metric_name=words,
                metric_value=value,
            )


def _title(model: RTLModel, card: RTLCardData) -> str:
    if card.model_name is not None:
        return card.model_name
    if card.model_id is not None:
        return card.model_id.split("/")[-1]
    return f"{backbone_name(model)} with {model.num_routes} tickets"


def _open_source(
    source: RTLModel | str | Path, folder: str | Path | None
) -> tuple[RTLModel, dict[str, Any] | None, Path, Path]:
    """The model, the record of its run or `None`, the folder of the model, and the folder of the card."""
    if isinstance(source, (str, Path)):
        saved = Path(source)
        if not (saved / "config.json").is_file():
            raise ValueError(
                f"`source` must be a model, or a folder with one that `save_pretrained` wrote, got {str(source)!r}."
            )
        model, run = RTLModel.from_pretrained(saved), read_run(saved)
        folder = saved if folder is None else folder
    elif folder is None:
        raise ValueError("`folder` is missing: give the folder to write the card into, `write_card(model, folder)`.")
    else:
        saved = Path(folder)
        model, run = source, source.training_run or read_run(saved)
    if run is not None and not was_trained_by(run, model):
        logger.warning("the model has other masks or weights than at the end of its run: its card leaves the run out.")
        run = None
    return model, run, saved, Path(folder)


def _rule(folder: Path, model: RTLModel) -> str | None:
    """The description of the rule beside the model; `None` if there is none, or it does not fit the model."""
    try:
        return load_rule(folder, model.route_names).describe() if folder.is_dir() else None
    except (FileNotFoundError, ValueError):
        return None


def _has_code(folder: Path) -> bool:
    """Whether the model in `folder` is saved with its code, so that it can be loaded without this package."""
    config = folder / "config.json"
    return config.exists() and "auto_map" in json.loads(config.read_text())


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
