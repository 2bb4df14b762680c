"""Tickets without their model: a routed model saves, pushes and loads them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, HfApi

from .hub import TICKET_FILES, branch_head, commit_folder, read_card
from .routed_model import RoutedModel
from .ticket_files import load_tickets, save_tickets, write_page


class TicketSharing(RoutedModel):
    """
    The part of [`RTLModel`] that shares tickets with who has a copy of the model.
    """

    def save_tickets(
        self,
        save_directory: str | os.PathLike,
        routes: Sequence[int | str] | None = None,
        *,
        base_routes: Sequence[int | str] | None = None,
    ) -> dict[str, Any]:
        """
        Writes tickets without their model, for others who have it: masks, rows of statistics, thresholds, and weights
        that the base has not. About a bit per prunable weight and ticket; see `ticket_files.py`.

        Args:
            save_directory (`str`): a folder; tickets of an earlier save in it are replaced. If it has the `README.md`
                of a push of tickets, the generated part of that is brought up to date.
            routes (`Sequence[int | str]`, *optional*): whose tickets; by default all.
            base_routes (`Sequence[int | str]`, *optional*): the routes that the others' copies have, so that the
                weights in their union need not be written. By default all but those that were added to this model.

        Returns:
            The index that was written, as of `ticket_files.read_index`.

        Raises:
            ValueError: an unknown route, or a `README.md` that cannot be read. Nothing is written then.
        """
        self._check_savable()
        chosen = range(self.num_routes) if routes is None else self._route_indices("routes", routes)
        if base_routes is None:
            base_routes = [name for name in self.route_names if name not in self.config.added_routes]
        known = self._route_indices("base_routes", base_routes)
        return save_tickets(self, Path(save_directory), chosen, base_routes=known)

    def load_tickets(
        self,
        name_or_path: str | os.PathLike,
        routes: Sequence[str] | None = None,
        *,
        rename: Mapping[str, str] | Literal["auto"] | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> list[str]:
        """
        Adds tickets that were made from the same base as this model, which may be a compact copy or one in a smaller
        type, and may have other tickets since.

        Statistics of the union of all tickets, route -1, stay what they were.

        Args:
            name_or_path (`str`): a folder that `save_tickets` wrote, or a repository on the Hub.
            routes (`Sequence[str]`, *optional*): names of the tickets to add; by default all. Only their files are
                downloaded.
            rename (`Mapping[str, str]` or `"auto"`, *optional*): new names, for routes that the model has already;
                `"auto"` adds `-2` and so on.
            revision, token, cache_dir, local_files_only: as of `from_pretrained`.

        Returns:
            Names of the routes that were added, the last ones of the model.

        Raises:
            ValueError: no ticket files, damaged ones, of a newer version or of another base, which names the tensors
                that differ; an unknown or a taken name; or weights in the place of other tickets' weights. The model
                has not been changed then.
        """
        self._refuse_in_context("load_tickets()")
        self._refuse_on_view("load_tickets()")
        hub_arguments = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        return load_tickets(self, Path(name_or_path).as_posix(), routes, rename=rename, **hub_arguments)

    def push_tickets_to_hub(
        self,
        repo_id: str,
        routes: Sequence[int | str] | None = None,
        *,
        base_routes: Sequence[int | str] | None = None,
        commit_message: str = "Upload tickets",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> CommitInfo:
        """
        Pushes what `save_tickets` writes, in one commit, which also removes ticket files of an earlier push, and a
        page, which keeps what was written by hand into the one that is there. The page of a model stays as it is.

        Args: as of `save_tickets` and `push_to_hub`.
        """
        self._check_savable()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "tickets"
            index = self.save_tickets(folder, routes, base_routes=base_routes)
            repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            head = branch_head(repo_id, None if create_pr else revision, token=token)
            write_page(folder, index, read_card(repo_id, head, token=token), repo_id=repo_id)
            return commit_folder(
                folder,
                repo_id,
                outdated=TICKET_FILES,
                parent_commit=parent_commit or head,
                revision=revision,
                token=token,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def _route_indices(self, argument: str, routes: Sequence[int | str]) -> list[int]:
        if isinstance(routes, (str, int)):
            raise TypeError(f"`{argument}` must be a list of routes, got {routes!r}; for one write [{routes!r}].")
        indices = [self.mask_bank.route_index(route) for route in routes]
        if len(set(indices)) < len(indices):
            raise ValueError(f"`{argument}` = {list(routes)} names a route twice.")
        return indices
