"""What a run says: one progress bar, the losses and metrics that are logged, and what extraction finds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, default_logdir
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from ..analysis import ticket_similarity
from ..model_card.markdown import span
from ..modeling.mask_bank import MaskBank
from .callbacks import RTLTrainerCallback
from .plan import Round
from .ranking import count_units


class RunProgress(ProgressCallback, RTLTrainerCallback):
    """
    A progress bar that counts the steps of all extractions and all joint retrainings, and lines beside it: losses and
    metrics, in the form that `Trainer` gives them, and the tickets of every prune event. Metrics of single routes are
    not among the lines; [`result_table`] has them at the end.

    The bar is shown on a terminal and in a notebook. Lines are printed anywhere. Neither is shown on other processes
    than the first, with `disable_tqdm`, or where the logger `hf_rtl` is set above warnings.

    Args:
        route_names (`Sequence[str]`): the routes of the model.
        show (`bool`): whether this process shows anything.
        prints_logs (`bool`): whether losses and metrics are printed; notebooks have a table of transformers for them.
    """

    training_bar: Any

    def __init__(self, route_names: Sequence[str], *, show: bool, prints_logs: bool) -> None:
        super().__init__()
        self.route_names = route_names
        self.show = show and logging.getLogger("hf_rtl").isEnabledFor(logging.WARNING)
        self._prints_logs = prints_logs
        self._round = ""

    def say(self, text: str) -> None:
        """Prints a line, without tearing the bar."""
        if self.show:
            tqdm.write(text)

    def start(self, num_steps: int) -> None:
        if self.show:
            # With `disable=None` tqdm shows the bar on a terminal only.
            self.training_bar = tqdm(total=num_steps, disable=None, unit="step", dynamic_ncols=True)

    def begin_round(self, name: str) -> None:
        self._round = name

    def begin_route(self, name: str, event: int, num_events: int) -> None:
        self._describe(f"{self._round} · extraction {event}/{num_events} · {name}")

    def step(self, num_steps: int = 1) -> None:
        if self.training_bar is not None:
            self.training_bar.update(num_steps)

    def finish(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _describe(self, text: str) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description(text, refresh=False)

    # Events of a callback. `ProgressCallback` would have a bar for every joint retraining and every evaluation.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._describe(f"{self._round} · joint retraining")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._prints_logs:
            super().on_log(args, state, control, logs=self.without_routes(logs), **kwargs)

    def without_routes(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics without those of single routes."""
        return {name: value for name, value in metrics.items() if not self._is_of_a_route(name)}

    def _is_of_a_route(self, metric: str) -> bool:
        owner, _, _ = metric.rpartition("/")
        return any(owner == name or owner.endswith((f"_{name}", f"/{name}")) for name in self.route_names)

    def on_tickets_found(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        round: Round,
        banks: Sequence[MaskBank],
        figures: dict[str, float],
        **kwargs: Any,
    ) -> None:
        # A round to sparsity 0 has a bank and no prune event.
        for number, (num_kept, bank) in enumerate(zip(round.kept, banks, strict=False), start=1):
            found = describe_tickets(round, num_kept, bank)
            self.say(f"{self._round}, prune event {number} of {len(round.kept)}: {found}")


def describe_tickets(round_: Round, num_kept: int, bank: MaskBank) -> str:
    """One line on the tickets after a prune event: what each keeps, similarity, emptied layers."""
    point, weights = ticket_similarity(bank), f"{bank.num_weights:,} weights"
    parts = [f"every ticket keeps {num_kept:,} of {weights}"]
    if round_.layers:
        number, kind = sum(layer.num_units for layer in round_.layers), round_.layers[0].kind
        units = span(count_units(bank, round_.layers))
        parts = [
            f"every ticket keeps {units} of {number:,} {kind}s (asked: {num_kept:,})",
            f"{span(bank.count().tolist())} of {weights}",
        ]
    if len(point.route_names) > 1:
        parts.append(f"similarity {np.mean(point.similarity):.3f} (by chance {np.mean(point.chance):.3f})")
    num_emptied = {name: len(layers) for name, layers in point.emptied_layers.items()}
    if any(num_emptied.values()):
        name = max(num_emptied, key=lambda name: num_emptied[name])
        parts.append(f"up to {num_emptied[name]} emptied layers ({name!r})")
    else:
        parts.append("no emptied layer")
    return ", ".join(parts)


def keep_routes_out_of_notebooks(callbacks: Sequence[TrainerCallback], progress: RunProgress) -> None:
    """Leaves single routes out of the table that a notebook shows, which would get columns for each."""
    for callback in callbacks:
        if type(callback).__name__ == "NotebookProgressCallback":  # its module needs IPython
            vars(callback)["on_evaluate"] = partial(_evaluated, callback.on_evaluate, progress)


def _evaluated(show: Any, progress: RunProgress, *args: Any, metrics: Any, **kwargs: Any) -> None:
    show(*args, metrics=progress.without_routes(metrics), **kwargs)


def keep_log_of_tensorboard(callbacks: Sequence[TrainerCallback], output_dir: str) -> None:
    """Makes TensorBoard's log one of the run. By default it would lie in the folder of the first round's model."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(output_dir, default_logdir())


@contextmanager
def one_log(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """A context in which trackers end their log at its end. Several end it with every joint retraining."""
    trackers = [callback for callback in callbacks if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))]
    endings: dict[TrainerCallback, Any] = {}

    def put_off(tracker: TrainerCallback) -> Any:
        end = tracker.on_train_end
        return lambda *args, **kwargs: endings.update({tracker: partial(end, *args, **kwargs)})

    for tracker in trackers:
        vars(tracker)["on_train_end"] = put_off(tracker)
    try:
        yield
    finally:
        for tracker in trackers:
            del vars(tracker)["on_train_end"]
        for end in endings.values():
            end()


@contextmanager
def without_other_bars() -> Iterator[None]:
    """A context without the bars of transformers, such as one for every file that is saved."""
    before = set_tqdm_hook(lambda factory, args, kwargs: EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        set_tqdm_hook(before)
