"""A new route for a model that has been trained: its ticket leaves all that other tickets read as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import get_scheduler

from ..data.columns import columns_of, single_labels
from ..data.partition import Partition
from ..data.route_data import Chained, RouteData
from ..data.sampling import RouteBatchSampler
from ..modeling.hashing import hash_tensors
from ..modeling.mask_bank import MaskBank
from ..modeling.masking import UNION
from ..modeling.norm_statistics import tracked_buffers
from ..modeling.private_parameters import norms_biases_and_head
from ..pruning import round_schedule
from .evaluation import ONE_PREDICTION_PER_SAMPLE
from .extraction import Extraction
from .processes import Lifeline
from .randomness import Stream, reproducible
from .route_trainer import JointTrainer
from .router_fitting import evidence_of_each
from .run_directory import RunDirectory
from .ticket_trainer import TicketTrainer, named_state


class RouteAddingTrainer(JointTrainer):
    """
    The part of [`RTLTrainer`] that trains tickets one by one, and that adds a route to a trained model.
    """

    run_directory: RunDirectory

    def add_route(self, name: str, dataset: Any, *, calibration_dataset: Any = None) -> dict[str, Any]:
        """
        Finds a ticket for new data and adds it to the model as its last route, as it is now in memory.

        Frozen is what other tickets read: the weights in the union of their masks, and all that is shared. The new
        ticket may read it too; it trains the weights that no other ticket keeps, its row of statistics, and its own
        copies of norms, biases and head, which become private with it (see `make_private`). Outputs of the other
        tickets stay the same to the bit; the union, route -1, becomes that of all tickets, with the statistics that it
        has. Every training starts from the model's current weights, private parameters and statistics of the union.

        Prune events are those of `args` to the last of `target_sparsity`; then the ticket is retrained alone, for
        `num_train_epochs` or `max_steps` of single batches. Every process does all of it. Nothing is written:
        `save_pretrained`, or `save_tickets(folder, [name])` for who has the model as it was.

        Args:
            name (`str`): of the new route.
            dataset (map-style data set of dicts): its samples, all of this route; columns as of `train_dataset`. For
                `membership` samples of `train_dataset` are the negatives; for `labels` the trainer needs none.
            calibration_dataset (map-style data set of dicts, *optional*): samples of this route that it is not trained
                on, to go with the trainer's own `calibration_dataset`; alternatively `args.calibration_fraction` of
                `dataset`. With them a router is fitted again, and the threshold of a membership ticket calibrated;
                without, a router is taken out, with a warning, and the threshold is 0.

        Returns:
            `route`, its name; `kept`, the weights of the ticket; `added`, those that no other ticket keeps;
            `changed_decisions`, if a router was fitted again: by old route, the fraction of its held-out samples that
            it now sends elsewhere, else `None`.

        Raises:
            TypeError, ValueError: a name that is taken, data that does not suit, or running statistics that all
                tickets share. The model has not been changed then.
            FloatingPointError: a loss became NaN or infinite, or the ticket was cut from its input. Likewise.
            If a router cannot be fitted again, the error comes when the ticket has been added, without a router.
        """
        bank = MaskBank(self.model.config.prunable, [*self.model.route_names, name])
        if self.model.norm_statistics is None and any(tracked_buffers(self.model.backbone)):
            raise ValueError(
                "`add_route` needs `norm_statistics='per_route'`: with shared running statistics, those of the new "
                "route's data would change the outputs of all tickets."
            )
        data, held_out = self._data_with(name, dataset, calibration_dataset)
        before, self.route_data = self.route_data, data
        try:
            with self._explained_failures(), Lifeline(self.args.process_index, self.args.world_size) as lifeline:
                masks, weights, network = self._find_ticket(bank, data, lifeline)
        except BaseException:
            self.route_data = before
            raise
        if before is None:
            self.route_data = None
        else:
            self._partitions.append((data.dataset, data.partition))
        used = self.model.mask_bank.union()
        added = [mask & ~old.cpu() for mask, old in zip(masks, used, strict=True)]
        changed = self._append(name, masks, added, weights, network, held_out)
        return {
            "route": name,
            "kept": sum(int(mask.sum()) for mask in masks),
            "added": sum(int(mask.sum()) for mask in added),
            "changed_decisions": changed,
        }

    def _data_with(self, name: str, dataset: Any, calibration_dataset: Any) -> tuple[RouteData, RouteData | None]:
        """The training data with a new route, and its samples that are held out of training."""
        membership = self.model.config.ticket_task == "membership"
        if membership and self.route_data is None:
            raise ValueError(
                "`add_route` needs the trainer's `train_dataset`: a membership ticket tells its own samples from "
                "those of other routes, which are taken from there."
            )
        alone = Partition(np.zeros(len(dataset), dtype=np.int64), [name])
        if not membership:
            labels = single_labels(dataset) if isinstance(self.model, ONE_PREDICTION_PER_SAMPLE) else None
            alone.check("labels", labels)
        if calibration_dataset is not None and (self.calibration_dataset is None or self.args.calibration_fraction):
            raise ValueError(
                "`calibration_dataset` of a new route goes with one of the trainer, of the other routes; this trainer "
                + ("has none." if self.calibration_dataset is None else "holds out `calibration_fraction` instead.")
            )
        own = RouteData(
            dataset,
            alone,
            membership=membership,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            batch_size=self.args.route_batch_size,
            seed_transforms=self.args.seed_transforms,
        )
        held_out = None
        if self.args.calibration_fraction:
            own, held_out = own.hold_out(self.args.calibration_fraction, self.args.seed)
        elif calibration_dataset is not None:
            held_out = copy.copy(own)
            held_out.dataset = calibration_dataset
            held_out.partition = Partition(np.zeros(len(calibration_dataset), dtype=np.int64), [name], True)
        others = None if self.route_data is None else (self.route_data.dataset, self.route_data.partition)
        return self._chained(name, others, own), held_out

    def _chained(self, name: str, others: tuple[Any, Partition] | None, new: RouteData) -> RouteData:
        """`others`, samples of the model's routes, followed by those of a `new` one."""
        chained = copy.copy(new)
        route_ids, rule = new.partition.route_ids + self.model.mask_bank.num_routes, None
        if others is not None:
            if set(columns_of(new.dataset)) != set(columns_of(others[0])):
                raise ValueError(
                    f"the data of the new route {name!r} has the columns {', '.join(columns_of(new.dataset))}, but "
                    f"that of the trainer {', '.join(columns_of(others[0]))}; both need the same."
                )
            chained.dataset = Chained([others[0], new.dataset])
            route_ids, rule = np.concatenate([others[1].route_ids, route_ids]), others[1].rule
        # The rule of the others does not know the new route, which is said when the model is saved without it.
        chained.partition = Partition(route_ids, [*self.model.route_names, name], allow_empty=True, rule=rule)
        return chained

    def _find_ticket(
        self, bank: MaskBank, data: RouteData, lifeline: Lifeline
    ) -> tuple[list[Tensor], list[Tensor], nn.Module]:
        """Masks and weights, on the CPU, of the ticket of the last route of `bank`, and the network that has them."""
        args, route = self.args, bank.num_routes - 1
        network = self._network_of_new_route()
        theta = {name: tensor.detach().clone() for name, tensor in named_state(network)}
        trainer = self._ticket_trainer(theta, network, frozen=self.model.mask_bank.union())
        (kept,) = round_schedule(
            bank.num_weights, args.target_sparsity[-1:], schedule=args.prune_schedule, amount=args.prune_amount
        )
        steps = self._extraction_steps(route)
        extraction = Extraction(
            run_directory=self.run_directory,
            processes=self.processes,
            lifeline=lifeline,
            bank=bank,
            theta0={name: tensor.cpu() for name, tensor in theta.items()},
            make_ticket_trainer=lambda: trainer,
            batches=self._extraction_batches,
            inputs_of=self._inputs_of,
            num_steps=[0] * route + [steps],
            args=args,
            progress=self.progress,
        )
        sampler = data.sampler((Stream.RETRAINING, 0), routes=[route])
        retraining_steps = args.max_steps
        if retraining_steps < 0:
            retraining_steps = math.ceil(args.num_train_epochs * sampler.num_updates_per_route)

        def make_scheduler(optimizer: Optimizer) -> LRScheduler:
            return get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                args.get_warmup_steps(retraining_steps),
                retraining_steps,
                args.lr_scheduler_kwargs,
            )

        mask = [torch.ones(shape, dtype=torch.bool) for shape in bank.shapes]
        self.progress.start(len(kept) * steps + retraining_steps)
        self.progress.begin_round("a new route")
        try:
            with reproducible(args.extraction_threads):
                for event, num_kept in enumerate(kept):
                    self.progress.begin_route(bank.route_names[-1], event + 1, len(kept))
                    mask, _ = extraction.train_and_prune(route, event, mask, num_kept, self.progress.step)
                batches = islice(self._endless(data, sampler), retraining_steps)
                seed = (args.seed, Stream.RETRAINING, route)
                on_step = self.progress.step
                weights = trainer.train(mask, batches, seed=seed, on_step=on_step, make_scheduler=make_scheduler)
        finally:
            self.progress.finish()
        lifeline.meet()
        state = dict(named_state(network))
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise FloatingPointError("a weight became NaN or infinite; lower `learning_rate`, or check the data.")
        self.processes.check_same({"ticket": hash_tensors(state)})
        return mask, weights, network

    @torch.no_grad()
    def _network_of_new_route(self) -> nn.Module:
        """
        A copy of the backbone without masks, with the private parameters and statistics of the union of all tickets,
        of which only those parameters are trained that a new ticket may have of its own.
        """
        model, private = self.model, self.model.private_parameters
        network = copy.deepcopy(model.backbone).to(self.args.device)
        for own, parameter, row in zip(private.own(network), private.rows, private.row(UNION), strict=True):
            own.copy_(row)
            own.requires_grad_(parameter.requires_grad)
        if model.norm_statistics is not None:
            for (module, name), rows in zip(tracked_buffers(network), model.norm_statistics.rows, strict=True):
                module.get_buffer(name).copy_(rows[UNION])
        trained = {*self._own_names(), *model.mask_bank.weight_names}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in trained)
        return network

    def _own_names(self) -> list[str]:
        """The parameters that a new ticket has of its own."""
        found = norms_biases_and_head(self.model.backbone, self.model.mask_bank.weight_names)
        return list(dict.fromkeys([*self.model.private_parameters.names, *found]))

    @torch.no_grad()
    def _append(
        self,
        name: str,
        masks: Sequence[Tensor],
        added: Sequence[Tensor],
        weights: Sequence[Tensor],
        network: nn.Module,
        held_out: RouteData | None,
    ) -> dict[str, float] | None:
        """Gives the model the new ticket, and fits again what decides by outputs. Returns the changed decisions."""
        model, config, others = self.model.eval(), self.model.config, self.calibration_dataset
        has_data = others is not None and held_out is not None and self.route_data is not None
        refit = model.router is not None and has_data
        if refit:
            router, threshold = config.router, config.router_threshold
            fallback = UNION if config.router_fallback is None else config.router_fallback
            before, home_routes = self._decisions(others)
            model.set_router(None)
        if others is not None and held_out is not None:
            chained = self._chained(name, (others, self._partition_of(others)), held_out)
            self._partitions.append((chained.dataset, chained.partition))
            self.calibration_dataset = chained.dataset
        for weight, values, mask in zip(model.masker.weights, weights, added, strict=True):
            weight.copy_(torch.where(mask.to(weight.device), values.to(weight.device), weight))
        model.append_ticket(
            name,
            masks,
            statistics=[module.get_buffer(buffer) for module, buffer in tracked_buffers(network)],
            private_parameters={own: network.get_parameter(own).detach() for own in self._own_names()},
            brings_weights=True,
        )
        if config.thresholds is not None and held_out is not None:
            config.thresholds = [*config.thresholds[:-1], (self._calibrated_thresholds() or [0.0])[-1]]
        if not refit:
            return None
        self.fit_router(router, threshold=threshold, fallback=fallback)
        after, _ = self._decisions(others)
        changed = (before != after).double()
        routes = range(model.num_routes - 1)
        return {model.route_names[k]: float(changed[home_routes == k].mean()) for k in routes}

    def _decisions(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """Where the router sends every sample of a data set, and their own routes, on the CPU."""
        router = self.model.router
        assert router is not None
        pairs = [
            self.accelerator.gather_for_metrics(
                (self.model.decide(evidence_of_each(router, self.model, inputs)).route_ids, route_ids)
            )
            for inputs, route_ids in self._batches_with_routes(dataset)
        ]
        decisions, home_routes = (torch.cat(tensors).cpu() for tensors in zip(*pairs, strict=True))
        return decisions, home_routes

    # Trainings of single tickets

    def _ticket_trainer(
        self, theta0: dict[str, Tensor], network: nn.Module | None = None, frozen: Sequence[Tensor] | None = None
    ) -> TicketTrainer:
        if network is None:
            network = copy.deepcopy(self.model.backbone).to(self.args.device)
            private = self.model.private_parameters
            for own, rows in zip(private.own(network), private.rows, strict=True):
                own.requires_grad_(rows.requires_grad)
        return TicketTrainer(
            network=network,
            theta0=theta0,
            weight_names=self.model.mask_bank.weight_names,
            make_optimizer=self._plain_optimizer,
            compute_loss=lambda network, batch: self.compute_loss(network, self._inputs_of(batch)),
            autocast=self.compute_loss_context_manager,
            frozen=frozen,
            max_grad_norm=self.args.max_grad_norm,
            fp16=self.args.mixed_precision == "fp16",
        )

    def _extraction_steps(self, route: int) -> int:
        if self.args.extraction_steps is not None:
            return self.args.extraction_steps
        updates = self._require_data().sampler((), routes=[route]).num_updates_per_route
        return max(1, round(self.args.extraction_epochs * updates))

    def _extraction_batches(self, route: int, event: int) -> Iterator[dict[str, Any]]:
        data = self._require_data()
        sampler = data.sampler((Stream.EXTRACTION, event), routes=[route])
        return islice(self._endless(data, sampler), self._extraction_steps(route))

    def _endless(self, data: RouteData, sampler: RouteBatchSampler) -> Iterator[dict[str, Any]]:
        return data.endless_batches(sampler, self._collate(), **self._loader_arguments())

    def _inputs_of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the plain backbone takes it."""
        batch = self._prepare_inputs({name: value for name, value in batch.items() if name != "route"})
        if self._require_data().membership:
            batch["labels"] = self.model.ticket_labels(batch["labels"])
        return batch
