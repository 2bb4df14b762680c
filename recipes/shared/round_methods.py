"""What `recipes/compare.py` trains in rounds: tickets, and what they must beat, from the same weights and data."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.pruning import random_masks, shuffled_masks

from .methods import SeedRuns, file_name
from .models import model_of_round, tickets_of_round
from .one_pass import DENSE, ONE, OTHER, RANDOM, TICKETS, UNION, Served, num_bytes
from .plain_networks import independent_networks, inputs_of, one_vs_rest_network
from .prepare import Prepared


EACH, ADAPTERS = "a model per route", "one mask, LoRA per route"
ONE_VS_REST, SHUFFLED = "one mask, each logit alone", "layer-shuffled tickets"
METHODS = [DENSE, ONE, UNION, ONE_VS_REST, EACH, ADAPTERS, RANDOM, SHUFFLED, OTHER, TICKETS]
# Those of membership tickets alone.
OF_MEMBERSHIP = (ONE_VS_REST,)
_CONTROL_MASKS = {RANDOM: random_masks, SHUFFLED: shuffled_masks}


class RoundMethods(SeedRuns):
    """
    The runs of one seed below `folder`; see [`SeedRuns`].

    Args:
        prepared ([`Prepared`]): data and models of the seed.
        args ([`RTLTrainingArguments`]): the arguments that all methods share.
        folder (`Path`): the parent of the methods' folders.
        adapter_learning_rate (`float`): of LoRA adapters.
    """

    tickets = TICKETS

    def __init__(
        self, prepared: Prepared, args: RTLTrainingArguments, folder: Path, adapter_learning_rate: float
    ) -> None:
        super().__init__(folder, replace(args, route_column=prepared.route_column))
        self.prepared, self.adapter_learning_rate = prepared, adapter_learning_rate

    def trainer(self, method: str) -> RTLTrainer:
        data = {name: value for name, value in self.prepared.trainer_data().items() if name != "eval_dataset"}
        if method == TICKETS:
            return RTLTrainer(self.prepared.make_model(), self.arguments(method), **data)
        plan = self.trainer(TICKETS).plan()
        args = self.arguments(
            method,
            router="given",
            route_column=None,
            competing_epochs=0,
            target_sparsity=self.sparsities(method),
            # As many samples as all tickets together, in extraction and in retraining.
            extraction_steps=sum(plan.extraction_steps),
            max_steps=plan.retraining_steps,
        )
        data = {**data, "train_dataset": self.prepared.labelled(data["train_dataset"])}
        data.pop("partition", None)
        return RTLTrainer(self.prepared.make_single_model(), args, **data)

    def sparsities(self, method: str) -> list[float]:
        if method == UNION:
            return [1 - report["union"] / self.num_weights for report in self.trained(TICKETS).rounds]
        return super().sparsities(method)

    def serve(self, method: str, index: int) -> Served | None:
        """The plain models of a method at the sparsity of round `index`; `None` if there are none that small."""
        names = self.prepared.rows.route_names
        if method == DENSE:
            network = self._model(DENSE, 0).extract_ticket(0)
            return Served([network] * len(names), num_bytes(network))
        if method in (ONE, UNION):
            model = self._model(method, index)
            return Served([model.extract_ticket(0)] * len(names), model.footprint()["compact_bytes"])
        trainer = self.trained(TICKETS)
        report = trainer.rounds[index]
        if method == ONE_VS_REST:
            return self._one_vs_rest(trainer, index)
        if method in _CONTROL_MASKS:
            return routed(self._with_other_masks(trainer, report, method))
        model = model_of_round(trainer, report)
        own = routed(model)
        if method == OTHER:
            return Served([*own.models[1:], own.models[0]], own.stored_bytes)
        if method == EACH:
            return Served(self._independent(trainer, index), model.footprint()["independent_compact_bytes"])
        return self.adapters(trainer, index, own.stored_bytes) if method == ADAPTERS else own

    def _model(self, method: str, index: int) -> RTLModel:
        trainer = self.trained(method)
        return model_of_round(trainer, trainer.rounds[index])

    def _one_vs_rest(self, trainer: RTLTrainer, index: int) -> Served:
        """A network with the one mask and a logit per route, each trained on the batches of its ticket."""
        single = self._model(ONE, index)
        network = self.prepared.make_single_model().backbone
        network = one_vs_rest_network(trainer, network, single.mask_bank[0], round_index=index).cpu().eval()
        return Served([network] * trainer.model.num_routes, single.footprint()["compact_bytes"], each_alone=True)

    def _with_other_masks(self, trainer: RTLTrainer, report: dict[str, Any], method: str) -> RTLModel:
        """Masks of the tickets' densities, drawn by the seed and retrained as tickets."""
        masks = [
            _CONTROL_MASKS[method](mask, generator=torch.Generator().manual_seed(trainer.args.seed * 1000 + route))
            for route, mask in enumerate(tickets_of_round(trainer, report))
        ]
        name = f"{file_name(method)}-sparsity-{report['sparsity']:g}"
        return model_of_round(trainer, trainer.retrain(masks, like=report["folder"], name=name))

    def _independent(self, trainer: RTLTrainer, index: int) -> list[PreTrainedModel]:
        """A network of its own for each route, with the mask and the batches of its ticket."""
        tickets = tickets_of_round(trainer, trainer.rounds[index])
        networks = independent_networks(trainer, tickets, self.loss, round_index=index)
        return [copy.deepcopy(network).eval() for network in networks]

    def loss(self, network: nn.Module, batch: dict[str, Any]) -> Tensor:
        if self.prepared.rows.ticket_task == "labels":
            return network(**inputs_of(batch), labels=batch["labels"]).loss
        logits = network(**inputs_of(batch)).logits
        logits = logits[:, batch["route"]] if logits.shape[1] > 1 else logits[:, 0]
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    def adapters(self, trainer: RTLTrainer, index: int, budget: int) -> Served | None:
        """
        A LoRA adapter for each route on the network with one mask, of the largest rank whose bytes are within those of
        the tickets. Adapters are trained on the batches of the route in joint retraining, after the training of the
        network that they share, so they see more samples than any other method.
        """
        if find_spec("peft") is None:
            return None
        from peft import LoraConfig, get_peft_model

        single = self._model(ONE, index)
        network, spent = single.extract_ticket(0), single.footprint()["compact_bytes"]
        layers = {
            name: layer
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        }
        of_rank_1 = sum(4 * (layer.weight[0].numel() + layer.weight.shape[0]) for layer in layers.values())
        rank = (budget - spent) // (of_rank_1 * trainer.model.num_routes)
        if rank < 1:
            return None
        models = []
        for route in range(trainer.model.num_routes):
            torch.manual_seed(trainer.args.seed * 1000 + route)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
            adapted = get_peft_model(copy.deepcopy(network), config).to(trainer.args.device).train()
            trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=self.adapter_learning_rate, weight_decay=0.0)
            for batch in trainer.retraining_batches(index):
                if batch["route"] == route:
                    optimizer.zero_grad()
                    self.loss(adapted, batch).backward()
                    optimizer.step()
            models.append(adapted.merge_and_unload().cpu().eval())
        return Served(models, spent + rank * of_rank_1 * trainer.model.num_routes)


def routed(model: RTLModel) -> Served:
    """The tickets of a model, with the bytes of the compact file."""
    models = [model.extract_ticket(name) for name in model.route_names]
    return Served(models, model.footprint()["compact_bytes"])
