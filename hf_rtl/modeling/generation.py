"""`generate` of routed language models: the backbone's own `generate`, through the tickets of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_rtl import RTLConfig
from .mixed_batch import batch_device, check_samples, count, group_by_route, read_route_ids, select_samples
from .routed_model import RoutedModel


_SETTINGS = vars(GenerationConfig()).keys()
# Arguments of `generate` for the whole batch, which can neither be split by route nor shared by routes.
_WHOLE_BATCH_ARGUMENTS = {
    "streamer": "a streamer follows a single batch",
    "prefix_allowed_tokens_fn": "it gets positions in the batch",
    **dict.fromkeys(("cache", "past_key_values", "encoder_outputs"), "one ticket has computed it"),
}


# For transformers a class can generate if one of its bases has `GenerationMixin` in its name.
class RoutedGenerationMixin(RoutedModel):
    """
    The part of [`RTLModelForCausalLM`] and [`RTLModelForSeq2SeqLM`] that generates.

    `generation_config` is the backbone's own, the same object. It is saved with the model and loaded with it.
    """

    output_modalities = ("text",)  # pipelines read it

    def __init__(self, config: RTLConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        # A caller's own backbone may have only a `forward`.
        self.can_generate = self.backbone.can_generate

    @property
    def generation_config(self) -> GenerationConfig:
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, generation_config: GenerationConfig) -> None:
        # `PreTrainedModel` sets one made from the configuration before the backbone exists, whose own is better.
        if "backbone" in self._modules:
            self.backbone.generation_config = generation_config

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        route_ids: Any = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """
        `generate` of transformers, through tickets. Each ticket is put in place once for a whole generation.

        A batch of several routes is generated route by route, in ascending order, the union first. So `do_sample=True`
        draws random numbers for one route after the other, and a logits processor sees one route's samples at a time.

        Args:
            inputs (`Tensor`, *optional*): the prompts, `int64 [batch, length]`, also accepted as `input_ids`. For
                models without an encoder they are padded on the left.
            generation_config (`GenerationConfig`, *optional*): by default the model's.
            route_ids (`int`, `str`, `Tensor` or `list`, *optional*): see `forward`. `None`: the route of a view or of
                the active `route_context`, or else the one that the model's router finds for each prompt.
            **kwargs: to the backbone's `generate`, such as `attention_mask`, `max_new_tokens`, `num_beams`.

        Returns:
            `Tensor`, `int64 [batch * num_return_sequences, length]`, in the batch's order. Samples of several routes
            are padded at the end, with the pad token, to the longest one. For one route, the backbone's own return
            value, which may be a `ModelOutput`.

        Raises:
            ValueError: there is neither a route nor a router; bad `route_ids`; or, for a batch in which there are or
                may be several routes, an argument that only a batch of one route allows:
                `return_dict_in_generate=True`, `streamer`, `prefix_allowed_tokens_fn`, a cache or `encoder_outputs`.
        """
        named = {"generation_config": generation_config, "inputs": inputs}
        arguments = kwargs | {name: value for name, value in named.items() if value is not None}
        samples = {name: value for name, value in arguments.items() if _is_of_samples(name, value)}
        check_samples(samples)
        route_ids = self._resolve_route_ids(route_ids)
        if self._is_in_place(route_ids, samples):
            return self.backbone.generate(**arguments)
        if route_ids is None:
            self._require_router()
        if not samples and not isinstance(route_ids, (int, str)):
            raise ValueError(
                f"`input_ids` is missing, and `route_ids` = {route_ids}. Without a prompt there is a single sample; "
                f"give its route as an index or a name, as in `generate(route_ids={self.route_names[0]!r})`."
            )
        if route_ids is None:
            routes = self._infer_from_prompts(samples, arguments)
        else:
            given = read_route_ids(route_ids, samples, self.route_index)
            routes = [given] if isinstance(given, int) else given
        if len(set(routes)) == 1:
            with self.route_context(routes[0]):
                return self.backbone.generate(**arguments)
        return self._generate_mixed(samples, arguments, routes)

    def _infer_from_prompts(self, samples: dict[str, Tensor], arguments: dict[str, Any]) -> list[int]:
        if any(len(value) > 1 for value in samples.values()):
            # Before the router decides, so that whether a call is refused does not depend on the prompts.
            self._refuse_whole_batch_arguments(arguments)
        prompts = {name: value for name, value in samples.items() if not name.startswith("negative_prompt_")}
        if "inputs" in prompts:
            prompts[self.main_input_name] = prompts.pop("inputs")
        mask = prompts.get("attention_mask")
        if mask is not None and "position_ids" in inspect.signature(self.backbone.forward).parameters:
            # As `generate` counts them, so that padding on the left does not shift a prompt.
            prompts.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        return self.infer_routes(**prompts).route_ids.tolist()

    def _generate_mixed(self, samples: dict[str, Tensor], arguments: dict[str, Any], routes: list[int]) -> Tensor:
        """Generates each route's samples separately, and returns all in the batch's order."""
        self._refuse_whole_batch_arguments(arguments)
        groups = group_by_route(routes, batch_device(samples))
        generated = []
        for route, positions in groups.items():
            selected = select_samples(samples, positions, len(routes))
            with self.route_context(route):
                sequences = self.backbone.generate(**{**arguments, **selected})
            generated.append(sequences.view(count(positions), -1, sequences.shape[1]))
        lengths = {sequences.shape[2] for sequences in generated}
        pad_token = self._pad_token(arguments)
        if len(lengths) > 1 and pad_token is None:
            raise ValueError(
                f"the routes of this batch have generated sequences of {sorted(lengths)} tokens, and there is neither "
                "a `pad_token_id` nor an `eos_token_id` to pad the shorter ones with: pass `pad_token_id=`."
            )
        shape = (len(routes), generated[0].shape[1], max(lengths))
        merged = generated[0].new_full(shape, 0 if pad_token is None else pad_token)
        for positions, sequences in zip(groups.values(), generated, strict=True):
            merged[positions, :, : sequences.shape[2]] = sequences
        return merged.flatten(0, 1)

    def _refuse_whole_batch_arguments(self, arguments: Mapping[str, Any]) -> None:
        refused = {name: why for name, why in _WHOLE_BATCH_ARGUMENTS.items() if arguments.get(name) is not None}
        if self._setting("return_dict_in_generate", arguments):
            refused["return_dict_in_generate"] = "scores and caches of several routes cannot be merged"
        for name, why in refused.items():
            raise ValueError(
                f"`{name}` is not allowed for a batch whose samples may be of several routes: {why}. Leave it out, or "
                "call `generate` once per route, with an index or a name as `route_ids`; `infer_routes` gives the "
                "router's decision."
            )

    def _setting(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """A setting of the generation: from the call, else from its `generation_config`, else from the model's."""
        if name in arguments:
            return arguments[name]
        given = getattr(arguments.get("generation_config"), name, None)
        return getattr(self.generation_config, name) if given is None else given

    def _pad_token(self, arguments: Mapping[str, Any]) -> int | None:
        """The pad token; without one, as in transformers, the first end token."""
        pad_token, end_tokens = self._setting("pad_token_id", arguments), self._setting("eos_token_id", arguments)
        if pad_token is None and end_tokens is not None:
            return int(torch.as_tensor(end_tokens).flatten()[0])
        return pad_token

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """Without it, pipelines of transformers 5.17 would not use their defaults, such as sampling."""
        return self.backbone._prepare_generation_config(*args, **kwargs)

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: Any,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Called by `from_pretrained`, to load `generation_config.json`. Unlike transformers' own method, it never runs a
        `generate` from a repository.
        """
        if generation_config is not None:
            self.generation_config = GenerationConfig.from_dict(generation_config.to_dict())
            return
        try:
            self.generation_config = GenerationConfig.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            # The model was saved without one. The backbone has made its own from its configuration.
            return
        except Exception as error:  # what came instead decides where it fails
            raise ValueError(
                f"`generation_config.json` of {str(pretrained_model_name_or_path)!r} is damaged: "
                f"{type(error).__name__}: {error}"
            ) from error


def _is_of_samples(name: str, value: Any) -> bool:
    """Whether an argument of `generate` has a row per sample."""
    return isinstance(value, Tensor) and name not in _SETTINGS
