"""One progress bar over a whole run, with the route and the round that are being worked on."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class RunProgress(TrainerCallback):
    """
    Counts the steps of all extractions and all joint retrainings in one bar.

    Shown by rank 0 on a terminal only, and not with `disable_tqdm`.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bar: tqdm | None = None
        self._round = ""

    def start(self, num_steps: int) -> None:
        # `disable=None` is tqdm's word for: quiet unless the output is a terminal.
        self._bar = tqdm(total=num_steps, disable=None if self._show else True, unit="step", dynamic_ncols=True)

    def begin_round(self, name: str) -> None:
        self._round = name

    def begin_route(self, name: str, event: int, num_events: int) -> None:
        self._describe(f"{self._round} · extraction {event}/{num_events} · {name}")

    def step(self, num_steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(num_steps)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._describe(f"{self._round} · joint retraining")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)
