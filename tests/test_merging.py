"""Merging by owner against tomesd, which has the published matching, and against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tomesd
import torch
from naive import mean_rows, merge_most_similar, top_left
from torch import Tensor

from agentsd.methods import token_merging as merging
from agentsd.methods.token_merging import Matching, match, unmerge

GRIDS = [(8, 8, 2, 2), (9, 7, 2, 2), (8, 12, 4, 4), (10, 7, 3, 4), (6, 5, 1, 2)]
RATIOS = [0.1, 0.5, 0.9, 1.0]


def tokens(batch: int, count: int, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64)


def owners(matching: Matching, merges: int) -> Tensor:
    """``[B, N]``: the owners of a single level."""
    return merging.owners(matching, merges)[0]


def merge(x: Tensor, owner: Tensor, rows: int) -> Tensor:
    """The merged rows of each image, ``[B, rows, C]``."""
    return merging.merge(x, owner, len(x) * rows).view(len(x), rows, -1)


def _sorted_rows(x: Tensor) -> Tensor:
    """Each image's rows sorted by their values, to compare them regardless of order."""
    return torch.stack([image[image[:, 0].argsort()] for image in x])


def check_same_merge(
    x: Tensor, h: int, w: int, sy: int, sx: int, merges: int, owner: Tensor
) -> None:
    """Merged rows (in any order) and the unmerged result are tomesd's."""
    rows = x.shape[1] - merges
    their_merge, their_unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        x, w, h, sx, sy, merges, no_rand=True
    )
    ours, theirs = merge(x, owner, rows), their_merge(x)
    torch.testing.assert_close(_sorted_rows(ours), _sorted_rows(theirs))
    torch.testing.assert_close(unmerge(ours, owner), their_unmerge(theirs))


def _owner(x: Tensor, h: int, w: int, sy: int, sx: int, ratio: float) -> tuple[int, Tensor]:
    destinations = torch.tensor(top_left(h, w, sy, sx))
    merges = min(x.shape[1] - len(destinations), int(x.shape[1] * ratio))
    return merges, owners(match(x, destinations), merges)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("h", "w", "sy", "sx"), GRIDS)
class TestAgainstTomesd:
    def test_merges_like_tomesd(
        self, h: int, w: int, sy: int, sx: int, ratio: float, batch: int
    ) -> None:
        x = tokens(batch, h * w)
        check_same_merge(x, h, w, sy, sx, *_owner(x, h, w, sy, sx, ratio))

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda owner, rows: owner.roll(1, dims=1),
            lambda owner, rows: torch.where(owner == 0, rows - 1, owner),
        ],
        ids=["shifted by one", "a destination lost"],
    )
    def test_a_wrong_owner_fails(
        self,
        h: int,
        w: int,
        sy: int,
        sx: int,
        ratio: float,
        batch: int,
        wrong: Callable[[Tensor, int], Tensor],
    ) -> None:
        x = tokens(batch, h * w)
        merges, owner = _owner(x, h, w, sy, sx, ratio)
        with pytest.raises(AssertionError):
            check_same_merge(x, h, w, sy, sx, merges, wrong(owner, x.shape[1] - merges))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("merges", [0, 1, 11, 24])
def test_equals_loops(merges: int, batch: int) -> None:
    x, destinations = tokens(batch, 30), [0, 7, 8, 19, 22, 29]
    owner = owners(match(x, torch.tensor(destinations)), merges)
    naive = torch.stack([mean_rows(i, merge_most_similar(i, destinations, merges)) for i in x])
    torch.testing.assert_close(_sorted_rows(merge(x, owner, 30 - merges)), _sorted_rows(naive))


class TestOwners:
    def test_destinations_own_themselves_in_their_order(self) -> None:
        destinations = torch.tensor([3, 0, 9])
        owner = owners(match(tokens(2, 12), destinations), 5)
        assert owner[:, destinations].tolist() == [[0, 1, 2], [7, 8, 9]]

    @pytest.mark.parametrize("merges", [0, 4, 9])
    def test_every_row_has_an_owner(self, merges: int) -> None:
        owner = owners(match(tokens(3, 12), torch.tensor([0, 5, 6])), merges)
        for number, image in enumerate(owner):
            first = number * (12 - merges)
            assert image.unique().tolist() == list(range(first, first + 12 - merges))

    def test_without_merges_nothing_changes(self) -> None:
        x = tokens(2, 12)
        owner = owners(match(x, torch.tensor([0, 5, 6])), 0)
        assert torch.equal(unmerge(merge(x, owner, 12), owner), x)

    def test_the_most_similar_merge_first(self) -> None:
        matching = match(tokens(1, 20), torch.tensor([0, 10]))
        merged = {m: set((owners(matching, m)[0] < 2).nonzero().flatten().tolist()) for m in (3, 4)}
        assert merged[3] < merged[4]
        (added,) = merged[4] - merged[3]
        left = [i for i in range(20) if i not in merged[4]]
        assert matching.similarity[0, added] >= matching.similarity[0, left].max()


class TestLevels:
    """Several numbers of rows at once: one table, one pass over the tokens."""

    def test_are_what_each_is_alone(self) -> None:
        x = tokens(3, 30)
        matching = match(x, torch.tensor([0, 7, 8, 19]))
        both = merging.owners(matching, 11, 26)
        table = merging.merge(x, both, 3 * (19 + 4))
        alone = [merge(x, owners(matching, merges), 30 - merges) for merges in (11, 26)]
        assert torch.equal(table, torch.cat([rows.flatten(0, 1) for rows in alone]))
        assert torch.equal(both[0], owners(matching, 11))
        assert torch.equal(both[1], owners(matching, 26) + 3 * 19)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_by_adding_them(self, swapped: bool) -> None:
        x = tokens(2, 30)
        both = merging.owners(match(x, torch.tensor([0, 7, 8, 19])), 11, 26)
        added = merging._mean_by_adding(
            x.flip(0).flatten(0, 1) if swapped else x.flatten(0, 1), both.flatten(1), 2 * (19 + 4)
        )
        assert torch.allclose(added, merging.merge(x, both, 2 * (19 + 4))) != swapped


class TestMatch:
    def test_batch_mates_do_not_matter(self) -> None:
        x, destinations = tokens(3, 16), torch.tensor([0, 4, 8])
        together = match(x, destinations)
        for i in range(3):
            alone = match(x[i : i + 1], destinations)
            torch.testing.assert_close(alone.similarity, together.similarity[i : i + 1])
            assert torch.equal(alone.best, together.best[i : i + 1])

    def test_length_does_not_matter(self) -> None:
        x, destinations = tokens(1, 16), torch.tensor([0, 4, 8])
        length = torch.arange(1.0, 17, dtype=x.dtype)[:, None]
        assert torch.equal(match(x, destinations).best, match(x * length, destinations).best)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_token_of_zeros_is_similar_to_none(self, dtype: torch.dtype) -> None:
        x = tokens(1, 16).to(dtype)
        x[0, 3] = x[0, 9] = 0
        matching = match(x, torch.tensor([0, 3, 5]))
        assert not matching.similarity.isnan().any()
        assert matching.similarity[0, 9] == 0
        assert matching.best[0].unique().tolist() != [1]


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_dtype_and_sums_many(self, dtype: torch.dtype) -> None:
        """Counts above 256 are not exact in bfloat16, sums above 65,504 not finite in float16."""
        x = torch.full((2, 700, 3), 120.0, dtype=dtype)
        merged = merge(x, torch.arange(2)[:, None].expand(2, 700), 1)
        assert merged.dtype == dtype
        assert torch.equal(merged, x[:, :1])

    def test_rows_of_one_token_pass_exactly(self) -> None:
        x = tokens(1, 5).to(torch.bfloat16)
        owner = torch.tensor([[4, 3, 2, 1, 0]])
        assert torch.equal(merge(x, owner, 5), x.flip(1))
        assert torch.equal(unmerge(x, owner), x.flip(1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_both_implementations_of_the_mean_agree(self, dtype: torch.dtype) -> None:
        """Embedding bags, and the fallback where they are missing or overflow."""
        x = tokens(2, 600).to(dtype)
        owner = owners(match(x, torch.arange(0, 600, 16)), 400)
        added = merging._mean_by_adding(x.flatten(0, 1), owner.view(1, -1), 400)
        eps = torch.finfo(dtype).eps
        merged = merge(x, owner, 200).flatten(0, 1)
        torch.testing.assert_close(merged, added, rtol=eps, atol=eps)
        assert not torch.allclose(merge(x.roll(1, 1), owner, 200).flatten(0, 1), added, atol=0.1)

    def test_has_gradients(self) -> None:
        x = tokens(2, 8, 2).requires_grad_()
        owner = owners(match(x.detach(), torch.tensor([1, 6])), 4)
        assert torch.autograd.gradcheck(lambda t: unmerge(merge(t, owner, 4), owner), (x,))


def test_matching_is_a_plain_tuple_of_tensors() -> None:
    """So that torch.compile and checkpointing handle it."""
    matching = match(tokens(1, 4), torch.tensor([0]))
    assert isinstance(matching, Matching)
    assert all(isinstance(part, Tensor) for part in matching)


def test_matching_in_blocks_equals_matching_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    destinations = torch.arange(0, 60, 4)
    whole = match(x, destinations)
    monkeypatch.setattr(merging, "BLOCK", 7 * 2 * len(destinations))
    blocks = match(x, destinations)
    assert torch.equal(blocks.best, whole.best)
    torch.testing.assert_close(blocks.similarity, whole.similarity)
