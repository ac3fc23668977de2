"""The token chosen from each cell: inside the cell, each in turn, and reproducible."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from agentsd.methods import Agent, Keys
from agentsd.methods.token_grid import cells, cycled_places, draw, random_places, tokens_at
from agentsd.patching.denoising_step import Position
from agentsd.patching.runtime import Runtime
from agentsd.patching.step_policy import GivenSteps
from agentsd.schedule import Phase, Schedule

CPU = torch.device("cpu")
GRIDS = [(8, 8, 2, 2), (8, 8, 4, 4), (6, 9, 2, 3), (6, 4, 2, 1), (12, 6, 3, 2)]
UNEVEN = [(7, 9, 2, 2), (5, 5, 4, 4), (3, 10, 4, 3), (1, 5, 2, 2), (9, 7, 4, 3)]


def chosen_at(
    phase: Phase, position: Position, height: int, width: int, *, heads: int = 1, seed: int = 0
) -> Tensor:
    """The tokens chosen at a step: keys ``[heads, cells]`` or destinations ``[cells]``."""
    phase = phase.override(min_tokens=0)
    runtime = Runtime(Schedule(phases=(phase,), seed=seed), [(1, heads)], GivenSteps())
    return runtime.step_at(position, phase, height, width).chosen[1, heads]


def keys(
    grid: tuple[int, int, int, int], step: int, heads: int = 3, select: str = "cycle", seed: int = 0
) -> Tensor:
    """The keys ``[heads, cells]`` of a step on a grid of ``(height, width, sy, sx)``."""
    height, width, sy, sx = grid
    phase = Keys(sx=sx, sy=sy, select=select)
    return chosen_at(phase, Position(step, 1000), height, width, heads=heads, seed=seed)


def check_visits(chosen: list[Tensor], tokens: int, *, exactly_once: bool) -> None:
    """Every token is chosen in every head over the steps of ``chosen``."""
    for head in torch.stack(chosen, dim=1):
        visits = Counter(head.flatten().tolist())
        assert set(visits) == set(range(tokens)), "a token never serves"
        if exactly_once:
            assert set(visits.values()) == {1}, "a token serves twice"


def check_own_cell(chosen: Tensor, grid: tuple[int, int, int, int]) -> None:
    """The token chosen for each cell lies in it."""
    _, width, sy, sx = grid
    columns = -(-width // sx)
    cell = chosen // width // sy * columns + chosen % width // sx
    assert (cell == torch.arange(chosen.shape[-1])).all(), "a token of another cell"


@pytest.mark.parametrize("first", [0, 1, 17])
@pytest.mark.parametrize("grid", GRIDS)
class TestCycle:
    def test_visits_each_token_once(self, grid: tuple[int, int, int, int], first: int) -> None:
        height, width, sy, sx = grid
        steps = [keys(grid, first + i) for i in range(sy * sx)]
        check_visits(steps, height * width, exactly_once=True)

    def test_starts_over_after_a_cycle(self, grid: tuple[int, int, int, int], first: int) -> None:
        assert torch.equal(keys(grid, first), keys(grid, first + grid[2] * grid[3]))


def test_a_noise_level_cannot_be_cycled_by() -> None:
    """A UNet without a run jumps between noise levels, so that a cycle would skip tokens."""
    at = Position(40, 1000, listed=False)
    cycle, random = (
        chosen_at(Keys(select=select), at, 8, 8, heads=3) for select in ("cycle", "random")
    )
    assert torch.equal(cycle, random)
    assert not torch.equal(keys((8, 8, 2, 2), 40), random)


@pytest.mark.parametrize("select", ["grid", "random"])
def test_other_choices_do_not_visit_all(select: str) -> None:
    steps = [keys((8, 8, 2, 2), i, select=select) for i in range(4)]
    with pytest.raises(AssertionError, match="never serves"):
        check_visits(steps, 64, exactly_once=True)


@pytest.mark.parametrize("grid", UNEVEN)
def test_every_token_is_chosen_where_the_edge_cuts_cells(grid: tuple[int, int, int, int]) -> None:
    height, width, sy, sx = grid
    steps = [keys(grid, i) for i in range(sy * sx)]
    check_visits(steps, height * width, exactly_once=False)
    with pytest.raises(AssertionError, match="twice"):
        check_visits(steps, height * width, exactly_once=True)


@pytest.mark.parametrize("select", ["grid", "random", "cycle"])
@pytest.mark.parametrize("grid", GRIDS + UNEVEN)
def test_each_cell_has_its_own_key(grid: tuple[int, int, int, int], select: str) -> None:
    chosen = keys(grid, 5, select=select)
    check_own_cell(chosen, grid)
    if chosen.shape[-1] > 1:
        with pytest.raises(AssertionError, match="another cell"):
            check_own_cell(chosen.roll(1, dims=-1), grid)


def test_heads_and_cells_start_at_their_own_places() -> None:
    chosen = keys((16, 16, 2, 2), 0, heads=4)
    place = chosen // 16 % 2 * 2 + chosen % 2
    assert all(0.1 < (place == p).float().mean() < 0.4 for p in range(4))
    for a in range(4):
        for b in range(a):
            assert (place[a] == place[b]).float().mean() < 0.6


class TestDestinations:
    @staticmethod
    def at(step: int, *, use_rand: bool = True, seed: int = 0, size: int = 9) -> Tensor:
        phase = Agent(sx=2, sy=2, use_rand=use_rand)
        return chosen_at(phase, Position(step, 50), size, size, seed=seed)

    def test_top_left_without_rand(self) -> None:
        expected = [row * 9 + column for row in range(0, 8, 2) for column in range(0, 8, 2)]
        assert self.at(3, use_rand=False).tolist() == expected

    def test_one_of_each_whole_cell(self) -> None:
        """Leftover rows and columns have none: their tokens are sources."""
        chosen = self.at(3)
        assert (chosen // 9 // 2 * 4 + chosen % 9 // 2).tolist() == list(range(16))

    def test_depend_on_step_seed_and_grid_alone(self) -> None:
        assert torch.equal(self.at(3), self.at(3))
        others = [self.at(4), self.at(3, seed=1), self.at(3, size=8)]
        assert not any(torch.equal(self.at(3), other) for other in others)

    def test_places_are_drawn_uniformly(self) -> None:
        drawn = torch.cat([random_places((256,), 4, step, 0, CPU) for step in range(40)])
        share = drawn.bincount(minlength=4) / len(drawn)
        assert (share - 0.25).abs().max() < 0.02


class TestDraw:
    def test_same_key_same_draw(self) -> None:
        assert torch.equal(draw((5, 7), 3, 4), draw((5, 7), 3, 4))

    @pytest.mark.parametrize(
        "other", [((5, 7), 4, 3), ((5, 7), 3), ((5, 7), 3, 4, 0), ((7, 5), 3, 4), ((35,), 3, 4)]
    )
    def test_another_key_another_draw(self, other: tuple[tuple[int, ...], int]) -> None:
        assert not torch.equal(draw((5, 7), 3, 4).flatten(), draw(*other).flatten())

    def test_is_32_bits_and_spread(self) -> None:
        x = draw((4096,), 2**32 - 1, 0)
        assert x.dtype == torch.int64
        assert x.min() >= 0
        assert x.max() < 2**32
        assert abs(float(x.double().mean()) / 2**31 - 1) < 0.05
        assert len(x.unique()) > 4090

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        draw((100,), 1)
        cycled_places((3, 4), 4, 2, 0, CPU)
        random_places((3, 4), 4, 2, 0, CPU)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_is_the_same_on_every_device(self) -> None:
        assert torch.equal(draw((100,), 1, device="cuda").cpu(), draw((100,), 1))


@pytest.mark.parametrize(
    ("size", "partial", "expected"),
    [
        ((8, 8, 2, 4), False, (4, 2)),
        ((9, 7, 2, 4), False, (4, 1)),
        ((9, 7, 2, 4), True, (5, 2)),
        ((1, 3, 2, 4), False, (0, 0)),
        ((1, 3, 2, 4), True, (1, 1)),
    ],
)
def test_cells(size: tuple[int, int, int, int], partial: bool, expected: tuple[int, int]) -> None:
    assert cells(*size, partial=partial) == expected


def test_tokens_at_reads_places_row_by_row() -> None:
    place = torch.tensor([0, 1, 2, 3, 4, 5])  # in cells of 2 rows by 3 columns
    assert tokens_at(place, 4, 9, 2, 3, rows=2).tolist() == [0, 4, 8, 18 + 9, 18 + 9 + 4, 18 + 17]
