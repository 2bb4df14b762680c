"""Pictures of masks."""

import matplotlib
import pytest
import torch

from hf_rtl.plots import layer_profile, route_curves, similarity_heatmap


def make_matrix(num_routes):
    matrix = 0.4 + 0.3 * torch.rand(num_routes, num_routes, generator=torch.Generator().manual_seed(0))
    return ((matrix + matrix.T) / 2).fill_diagonal_(1)


@pytest.mark.slow
@pytest.mark.parametrize("num_routes", [1, 12, 13, 100])
def test_a_heatmap_of_any_number_of_routes_is_a_png(tmp_path, num_routes):
    names = [f"$route_{index}^$" for index in range(num_routes)]
    similarity_heatmap(make_matrix(num_routes), names, tmp_path / "new" / "similarity.png")
    (file,) = (tmp_path / "new").iterdir()
    height, width, channels = matplotlib.image.imread(file).shape
    assert min(height, width) > 400 and max(height, width) < 2500 and channels in (3, 4)


def test_the_same_similarities_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        similarity_heatmap(make_matrix(3), ["a", "b", "c"], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    similarity_heatmap(make_matrix(3), ["a", "b", "d"], tmp_path / "two")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_colours_are_of_pairs_alone(tmp_path):
    for name, diagonal in (("one", 1.0), ("two", 0.0)):
        similarity_heatmap(make_matrix(3).fill_diagonal_(diagonal), ["a", "b", "c"], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_two_empty_masks_are_no_number(tmp_path):
    matrix = torch.tensor([[torch.nan, torch.nan], [torch.nan, 1.0]])
    similarity_heatmap(matrix, ["nothing", "something"], tmp_path / "similarity.png")


def test_a_matrix_of_other_routes_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match=r"`matrix` has shape \[3, 3\], which does not fit 2 names: \[2, 2\]"):
        similarity_heatmap(make_matrix(3), ["a", "b"], tmp_path / "similarity.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_layers", [1, 60])
def test_a_profile_of_any_number_of_layers_is_a_png(tmp_path, num_layers):
    layers = torch.stack([make_matrix(3)] * num_layers)
    layers[0, 0, 1] = torch.nan  # both masks are empty there
    names = [f"backbone.$layer_{index}.weight" for index in range(num_layers)]
    layer_profile(layers, layers / 2, names, tmp_path / "new" / "profile.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "new" / "profile.png").shape
    assert min(height, width) > 300 and max(height, width) < 4000


def test_a_profile_shows_similarity_chance_and_names(tmp_path):
    layers, names = torch.stack([make_matrix(3)] * 2), ["a", "b"]
    for name, arguments in {
        "one": (layers, layers / 2, names),
        "same": (layers.clone(), layers / 2, names),
        "similarity": (layers * 0.9, layers / 2, names),
        "chance": (layers, layers / 3, names),
        "names": (layers, layers / 2, ["a", "c"]),
    }.items():
        layer_profile(*arguments, tmp_path / name)
    shown = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert shown["one"] == shown["same"] and len(set(shown.values())) == 4


@pytest.mark.parametrize("num_routes", [1, 16, 17])
def test_curves_of_any_number_of_routes_are_a_png(tmp_path, num_routes):
    sparsity = torch.linspace(0.2, 0.9, 5)
    values = torch.rand(5, num_routes, generator=torch.Generator().manual_seed(0))
    values[1] = torch.nan  # not measured there
    names = [f"$route_{index}^$" for index in range(num_routes)]
    panels = [("accuracy", sparsity, values), ("similarity", sparsity, values / 2)]
    route_curves(panels, names, tmp_path / "new" / "curves.png", marked=[(2, 0)])
    height, width, _ = matplotlib.image.imread(tmp_path / "new" / "curves.png").shape
    assert min(height, width) > 400 and max(height, width) < 2500


@pytest.mark.slow
def test_curves_show_values_names_chance_and_marks(tmp_path):
    sparsity, values, names = torch.linspace(0.2, 0.9, 5), make_matrix(5)[:, :2], ["a", "b"]
    for name, (panel, routes, options) in {
        "one": (values, names, {}),
        "same": (values.clone(), names, {}),
        "values": (values * 0.9, names, {}),
        "names": (values, ["a", "c"], {}),
        "chance": (values, names, {"chance": ("similarity", values[:, 0] / 2)}),
        "elsewhere": (values, names, {"chance": ("accuracy", values[:, 0] / 2)}),
        "marked": (values, names, {"marked": [(2, 1)]}),
    }.items():
        route_curves([("similarity", sparsity, panel)], routes, tmp_path / name, **options)
    shown = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert shown["one"] == shown["same"] == shown["elsewhere"] and len(set(shown.values())) == 5


def test_a_heatmap_says_what_its_values_are(tmp_path):
    similarity_heatmap(make_matrix(3), ["a", "b", "c"], tmp_path / "one")
    similarity_heatmap(make_matrix(3), ["a", "b", "c"], tmp_path / "two", label="similarity of two classes")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()
