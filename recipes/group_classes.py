"""
Group the classes of a data set by the meaning of their names, as in the paper's CIFAR-100 experiment (section 4.1).

    python recipes/group_classes.py --dataset uoft-cs/cifar100 --label_column fine_label --groups_file FILE.yaml
    python recipes/group_classes.py --names cat dog horse airplane ship truck --min_cluster_size 2

A text encoder embeds the names, UMAP projects the embeddings, and HDBSCAN clusters them. This needs
`pip install "hf_rtl[clusters]"`. The other recipes take the written file, {route: [classes]}, as --route_groups. Read
it first: give the groups better names, and try another --seed or --num_neighbors, on which much depends if names are
few. The paper embeds names by CLIP; --text_encoder takes encoders of text alone, by default a sentence encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.hf_argparser import HfArg

from hf_rtl.clustering import group_class_names
from hf_rtl.modeling.files import write_bytes
from shared.arguments import parse, set_up
from shared.data_arguments import DataArguments
from shared.read_data import read_splits


@dataclass
class GroupArguments:
    """What is grouped, how, and where the groups go."""

    groups_file: str = HfArg(default="groups.yaml", help="YAML file to write.")
    names: list[str] = HfArg(
        default_factory=list, help="Names to group; by default those of --dataset's --label_column."
    )
    text_encoder: str = HfArg(
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="Folder or repo id of a transformers encoder; its last states are averaged.",
    )
    min_cluster_size: int = HfArg(default=4, help="Least size of a cluster; outliers join one.")
    num_neighbors: int = HfArg(default=5, help="Neighbours in UMAP; more neighbours give larger groups.")
    num_dimensions: int = HfArg(default=2, help="Dimensions of UMAP's projection.")
    seed: int = HfArg(default=0, help="Seed of UMAP.")


def main() -> None:
    arguments, data = parse((GroupArguments, DataArguments), description=__doc__)
    set_up(None)
    names = arguments.names
    if not names:
        column = data.label_column or "label"
        names = read_splits(data, {"label_column": column})[0].features[column].names
    groups = group_class_names(
        names,
        lambda names: embed(names, arguments.text_encoder),
        min_cluster_size=arguments.min_cluster_size,
        num_neighbors=arguments.num_neighbors,
        num_dimensions=arguments.num_dimensions,
        seed=arguments.seed,
    )
    text = yaml.safe_dump(groups, sort_keys=False, default_flow_style=None, width=115)
    print(text, end="")
    write_bytes(Path(arguments.groups_file), text.encode())


@torch.no_grad()
def embed(names: list[str], text_encoder: str) -> Tensor:
    """Embeddings of C names, floats `[C, D]`: the mean over a name's tokens of the encoder's last hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    tokens = tokenizer([name.replace("_", " ") for name in names], padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(text_encoder)(**tokens).last_hidden_state
    weights = tokens["attention_mask"][:, :, None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


if __name__ == "__main__":
    main()
