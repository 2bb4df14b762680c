"""Pipelines of transformers whose calls say which ticket answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import Pipeline, pipeline

from .modeling.mixed_batch import positions_by_route, read_route_ids
from .modeling.modeling_rtl import RTLModel, model_folder


class _RoutedPipeline:
    """Stands in front of a pipeline's class, whose calls it gives to views of the model."""

    model: RTLModel

    def __call__(self, inputs: Any, *, route_ids: Any = None, **options: Any) -> Any:
        if route_ids is None:
            return super().__call__(inputs, **options)  # type: ignore[misc]
        routes = read_route_ids(route_ids, {}, self.model.route_index)
        if isinstance(routes, int):
            return self._through(routes)(inputs, **options)
        if not isinstance(inputs, (list, Dataset)):
            raise ValueError(f"`route_ids` = {route_ids!r} has a route per sample, but the input is no list of them.")
        count = len(inputs)  # type: ignore[arg-type]
        if len(routes) != count:
            raise ValueError(
                f"`route_ids` has {len(routes)} entries for {count} samples; give one per sample, or one for all."
            )
        answers: list[Any] = [None] * len(routes)
        for route, positions in positions_by_route(routes).items():
            # A pipeline answers a data set sample by sample, however few they are.
            samples = Subset(inputs, positions)  # type: ignore[arg-type]
            for position, answer in zip(positions, self._through(route)(samples, **options), strict=True):
                answers[position] = answer
        return answers

    def _through(self, route: int) -> Pipeline:
        """The same pipeline around the view of a route."""
        view = copy.copy(self)
        view.model = self.model.with_route(route)
        return view


def routed_pipeline(task: str, model: str | Path | RTLModel, **options: Any) -> Pipeline:
    """
    The pipeline of transformers for `task`, whose calls take `route_ids`: a route by index or name, or one per sample.
    Each route's samples are given to a view, `model.with_route(route)`, and answers come back in the samples' order.
    A call without `route_ids` is one of the plain pipeline.

    Args:
        task (`str`): the same as for `transformers.pipeline`.
        model (`str`, `Path` or [`RTLModel`]): a folder, a repo id, or a model.
        **options: the same as for `transformers.pipeline`. A model that is no name needs its processor here.

    Raises:
        TypeError: the model is no routed model.
        KeyError, OSError, ValueError: as `transformers.pipeline`. A call raises for unknown routes, and for another
            number of routes than of samples.

    Example:
        >>> classifier = routed_pipeline("image-classification", "out/final")
        >>> classifier(image, route_ids="west")
        >>> classifier([image, other], route_ids=["west", "north"], batch_size=2)
    """
    made = pipeline(task, model=str(model_folder(model)) if isinstance(model, (str, Path)) else model, **options)
    if not isinstance(made.model, RTLModel):
        raise TypeError(f"`model` is no routed model but a {type(made.model).__name__}, which `pipeline` takes.")
    # Only now is the class known that transformers has for the task.
    routed_class = type(f"Routed{type(made).__name__}", (_RoutedPipeline, type(made)), {})
    routed: Any = object.__new__(routed_class)
    vars(routed).update(vars(made))
    return routed
