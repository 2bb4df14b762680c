"""Pictures of masks."""

import itertools

import matplotlib
import pytest
import torch
from matplotlib.text import Text

from hf_rtl.plots import draw_table, layer_densities, layer_profile, line_style, route_curves, similarity_heatmap


LONG = [f"{name} hospital of the {index}th district" for index, name in enumerate(("north", "south", "west") * 8)]


@pytest.fixture
def drawn(monkeypatch):
    """The texts of saved figures -> their boxes in pixels."""
    texts, draw = {}, Text.draw

    def record(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text():
            texts[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(Text, "draw", record)
    return texts


def find_clipped(drawn, file):
    """The texts that are not whole inside the picture that they were drawn in."""
    height, width, _ = matplotlib.image.imread(file).shape
    assert drawn
    return [t.get_text() for t, box in drawn.items() if min(box.p0) < 0 or box.x1 > width or box.y1 > height]


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


@pytest.mark.parametrize("names", [["north", "south", "west"], LONG[:3], LONG], ids=len)
@pytest.mark.parametrize("label", ["similarity", "Jaccard similarity of two tickets, shallow layers"], ids=len)
def test_no_label_of_a_heatmap_is_clipped(tmp_path, drawn, names, label):
    similarity_heatmap(make_matrix(len(names)), names, tmp_path / "similarity.png", label=label)
    assert find_clipped(drawn, tmp_path / "similarity.png") == []


def test_no_label_of_other_pictures_is_clipped(tmp_path, drawn):
    sparsity, layers = torch.linspace(0.2, 0.9, 5), torch.stack([make_matrix(3)] * 24)
    layer_profile(layers, layers / 2, LONG, tmp_path / "a.png")
    assert find_clipped(drawn, tmp_path / "a.png") == []
    drawn.clear()
    layer_densities(make_matrix(24)[:, :10], LONG, LONG[:10], tmp_path / "a.png")
    assert find_clipped(drawn, tmp_path / "a.png") == []
    drawn.clear()
    route_curves([("accuracy", sparsity, make_matrix(24)[:5, :10])], LONG[:10], tmp_path / "a.png")
    assert find_clipped(drawn, tmp_path / "a.png") == []


def test_long_names_that_differ_stay_different(tmp_path, drawn):
    for names in (["x" * 40 + end for end in "abc"], [start + "x" * 40 for start in "abc"]):
        drawn.clear()
        similarity_heatmap(make_matrix(3), names, tmp_path / "similarity.png")
        labels = {text.get_text() for text in drawn if "x" in text.get_text()}
        assert len(labels) == 3 and set(map(len, labels)) == {20}


@pytest.mark.parametrize("chance, start", [(0.2, 0.2), (0.99, 0.9), (float("nan"), 0.9), (None, 0)])
def test_the_scale_goes_from_chance_to_one(tmp_path, drawn, chance, start):
    by_chance = None if chance is None else torch.full((3, 3), chance).fill_diagonal_(0)
    similarity_heatmap(0.885 + make_matrix(3) / 100, ["a", "b", "c"], tmp_path / "similarity.png", chance=by_chance)
    assert next(iter(drawn)).get_figure().axes[0].images[0].get_clim() == pytest.approx((start, 1))


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


@pytest.mark.slow
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


@pytest.mark.parametrize("num_routes", [1, 24, 25])
def test_curves_of_any_number_of_routes_are_a_png(tmp_path, num_routes):
    sparsity = torch.linspace(0.2, 0.9, 5)
    values = torch.rand(5, num_routes, generator=torch.Generator().manual_seed(0))
    values[1] = torch.nan  # not measured there
    names = [f"$route_{index}^$" for index in range(num_routes)]
    panels = [("accuracy", sparsity, values), ("similarity", sparsity, values / 2)]
    route_curves(panels, names, tmp_path / "new" / "curves.png", marked=[(2, 0)])
    height, width, _ = matplotlib.image.imread(tmp_path / "new" / "curves.png").shape
    assert min(height, width) > 400 and max(height, width) < 2500


def test_the_first_twelve_curves_repeat_neither_colour_nor_marker_and_dashes_tell_twelve_more():
    styles = [line_style(number) for number in range(24)]
    assert all(len({style[part] for style in styles[:12]}) == 12 for part in ("color", "marker"))
    assert len({tuple(style.values()) for style in styles}) == 24


def test_a_single_point_is_drawn_as_a_table(tmp_path, drawn):
    sparsity, values = torch.tensor([0.5]), torch.tensor([[0.75, torch.nan]])
    panels = [("accuracy", sparsity, values), ("similarity", sparsity, values / 3)]
    route_curves(panels, ["$day$", "night"], tmp_path / "a.png", chance=("similarity", torch.tensor([0.125])))
    shown = [text.get_text() for text in drawn if text.get_text().strip()]
    assert shown[-1] == "sparsity of a ticket: 50.0%"
    assert sorted(shown[:-1]) == sorted(
        ["route", "accuracy", "similarity", "similarity by chance"]
        + [r"\$day\$", "0.750", "0.250", "0.125", "night", "nan", "nan", "0.125"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [["a", "b"], LONG], ids=len)
def test_no_cell_of_a_table_is_clipped_or_runs_into_the_next(tmp_path, drawn, names):
    draw_table({"route": names, **dict.fromkeys(LONG[:3], names)}, tmp_path / "a.png", title="at a sparsity of 50 %")
    assert find_clipped(drawn, tmp_path / "a.png") == []
    pairs = itertools.combinations(drawn.items(), 2)
    assert [(a.get_text(), b.get_text()) for (a, box), (b, other) in pairs if box.overlaps(other)] == []


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


@pytest.mark.parametrize("num_routes, num_lines", [(1, 1), (24, 24), (25, 26)])
def test_densities_are_a_line_per_ticket_and_of_many_also_their_mean(tmp_path, monkeypatch, num_routes, num_lines):
    figures = []
    monkeypatch.setattr("hf_rtl.plots.save_png", lambda figure, file: figures.append(figure))
    density = make_matrix(num_routes)[:4] if num_routes > 4 else torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    layer_densities(density, [f"block.{n}.weight" for n in range(4)], [f"r{n}" for n in range(num_routes)], tmp_path)
    (axes,) = figures[0].axes
    values = torch.stack([torch.tensor(line.get_ydata()) for line in axes.lines], dim=1)
    assert values.shape == (4, num_lines) and torch.equal(values[:, :num_routes], density.double())
    if num_lines > num_routes:
        assert torch.allclose(values[:, -1], density.double().mean(1))
        assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["mean over tickets"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]


def test_densities_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has shape \[3, 2\], which does not fit 2 names and 3 routes"):
        layer_densities(torch.zeros(3, 2), ["a", "b"], ["x", "y", "z"], tmp_path / "a.png")
