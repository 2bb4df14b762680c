"""The data loaders of a trainer, with the workers that persist between their passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.route_data import EvaluationData, RouteData, repeat
from ..data.sampling import RouteBatchSampler
from .training_args import RTLTrainingArguments


class Loaders:
    """
    Makes the loaders of both phases and of evaluation. With persistent workers one loader serves all training on the
    same data, and one each evaluation set with a name, until `forget`.

    Args:
        args ([`RTLTrainingArguments`]), accelerator (`Accelerator`): those of the trainer.
        make_collator (`Callable`): makes the function that makes a batch of samples.
    """

    def __init__(
        self,
        args: RTLTrainingArguments,
        accelerator: Accelerator,
        make_collator: Callable[[], Callable[[list], dict[str, Any]]],
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.make_collator = make_collator
        self._training: tuple[RouteData, Any] | None = None
        self._evaluation: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """Arguments that all data loaders share."""
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
        }

    def training(self, data: RouteData, sampler: RouteBatchSampler) -> Any:
        """A loader of training data that moves batches to the device."""
        if self._training is not None and self._training[0] is data:
            loader = self._training[1]
            loader.batch_sampler.current = sampler
            return loader
        persistent = self.args.dataloader_persistent_workers
        loader = data.loader(sampler, self.make_collator(), **self.arguments(), persistent_workers=persistent)
        # The sampler already gives every rank its part of each batch, so accelerate must only move tensors.
        loader = prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )
        if persistent:
            self._training = data, loader
        return loader

    def endless_batches(
        self, data: RouteData, sampler: RouteBatchSampler, *, shared: bool = False
    ) -> Iterator[dict[str, Any]]:
        """
        Batches of training data without end, not yet on the device. Those of a `shared` loader with persistent workers
        end when it is asked for other batches.
        """
        if shared and self.args.dataloader_persistent_workers:
            return repeat(self.training(data, sampler).base_dataloader)
        return data.endless_batches(sampler, self.make_collator(), **self.arguments())

    def evaluation(self, samples: EvaluationData, name: str | None = None) -> DataLoader:
        """A loader of samples in their order, divided among the processes."""
        persistent = self.args.dataloader_persistent_workers and name is not None
        known = self._evaluation.get(name or "") if persistent else None
        if known is not None and known.dataset.dataset is samples.dataset:
            return known
        arguments = {"collate_fn": self.make_collator(), "persistent_workers": persistent, **self.arguments()}
        loader = self.accelerator.prepare(DataLoader(samples, batch_size=self.args.eval_batch_size, **arguments))
        if persistent:
            self._evaluation[name or ""] = loader
        return loader

    def forget(self) -> None:
        """Drops the loaders that are kept. Their workers end with the last reference to each."""
        self._training = None
        self._evaluation.clear()
        self.accelerator._dataloaders.clear()
