"""The docs' pictures of two-dimensional tasks are those of the families, and small."""

import math
from pathlib import Path

import pytest
import torch

from lightning_hrnn.evaluation.surfaces import SHEETS, draw_surfaces
from lightning_hrnn.tasks.surfaces import SURFACES

PICTURES = Path(__file__).parents[1] / "docs" / "images"


def test_every_surface_is_shown_and_has_its_minimum_in_the_frame():
    assert SURFACES.keys() == SHEETS["test-functions"].keys()
    for landscapes in SHEETS.values():
        for name, landscape in landscapes.items():
            x, y, losses = landscape.losses(161)
            assert losses.shape == (161, 161)
            if landscape.minimizer is None:
                continue
            row, column = divmod(int(losses.argmin()), 161)
            lowest = torch.stack([x[column], y[row]])
            at_minimizer = landscape.family.loss([torch.tensor([landscape.minimizer])], {})
            assert at_minimizer <= losses.min() + 2e-5, name
            if losses.min() < losses.flatten().kthvalue(2).values:  # one lowest point: it lies next to the cross
                near = (lowest - torch.tensor(landscape.minimizer)).abs()
                assert (near <= 0.05 * (x[-1] - x[0])).all() or name == "branin", name  # branin: three equal minima


@pytest.mark.parametrize("name", SURFACES)
def test_no_loss_is_negative_however_far_training_goes(name):
    torch.manual_seed(0)
    directions = torch.randn(20_000, 2)
    distances = torch.logspace(-3, 3, 20_000)[:, None]
    for centre in ((0.0, 0.0), SURFACES[name].minimizer):
        losses = SURFACES[name].loss([torch.tensor(centre) + distances * directions], {})
        assert losses.isfinite().all()
        assert (losses >= 0).all()


def test_michalewicz_is_smooth_where_it_is_mirrored():
    surface = SURFACES["michalewicz"]
    inside = torch.rand(1000, 2) * math.pi
    outside = torch.stack([-inside[:, 0], 2 * math.pi - inside[:, 1]], 1)
    torch.testing.assert_close(surface.loss([outside], {}), surface.loss([inside], {}), rtol=1e-4, atol=1e-4)
    sides = torch.tensor([[0.0, 1.0], [math.pi, 1.0], [1.0, 0.0], [1.0, math.pi]], requires_grad=True)
    (slopes,) = torch.autograd.grad(surface.loss([sides], {}).sum(), sides)
    assert (slopes[[0, 1, 2, 3], [0, 0, 1, 1]].abs() < 1e-5).all()


def test_grid_is_x_across_and_y_up():
    x, y, losses = SHEETS["test-functions"]["booth"].losses(5)
    expected = (x[3] + 2 * y[1] - 7) ** 2 + (2 * x[3] + y[1] - 5) ** 2
    assert losses[1, 3] == pytest.approx(expected.item())


def test_pictures_are_drawn_and_small(tmp_path):
    pytest.importorskip("matplotlib")
    paths = draw_surfaces(tmp_path / "images", points=20)
    assert [path.stem for path in paths] == list(SHEETS)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        shipped = PICTURES / path.name
        assert 5_000 < shipped.stat().st_size < 40_000, f"redraw {shipped} by draw_surfaces"
