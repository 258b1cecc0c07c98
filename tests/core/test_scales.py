"""Decisions from the largest regions down, against loops that ask one region after the other."""

import pytest
import torch

from msvit.core.candidates import Candidates
from msvit.core.scales import (
    activity_of,
    asked,
    check_room,
    checked_scales,
    flips,
    grids_of,
    nested,
    token_sizes,
    undivided,
)

# The grid of the smallest regions, and the sides of tokens in fine patches.
CASES = [((4, 6), (1, 2)), ((3, 5), (1, 3)), ((4, 8), (1, 2, 4)), ((5, 7), (1, 2, 4)), ((11, 8), (1, 2, 4, 8))]


def drawn(grid, sides, pictures=3):
    """Hard decisions of every level, from small regions to large, and soft values that lead to them."""
    soft = [torch.rand(pictures, *g) for g in grids_of(grid, sides)]
    return [(s > 0.5).float() for s in soft], soft


def asking(m, grid, sides):
    """Tokens (side, row, column) of one picture, and how many regions of each level were asked, by recursion."""
    grids, tokens, questions = grids_of(grid, sides), [], [0] * len(m)

    def ask(level, r, c):
        if level < 0:
            tokens.append((1, r, c))
            return
        questions[level] += 1
        if m[level][r, c]:
            tokens.append((sides[level + 1], r, c))
            return
        k = sides[level + 1] // sides[level]
        for i in range(k * k):
            ask(level - 1, k * r + i // k, k * c + i % k)

    for level in reversed(range(len(m))):
        for r in range(grids[level][0]):
            for c in range(grids[level][1]):
                inside = level + 1 < len(m) and r // 2 < grids[level + 1][0] and c // 2 < grids[level + 1][1]
                if not inside:  # it has no larger region around it
                    ask(level, r, c)
    return tokens, questions


@pytest.mark.parametrize(("grid", "sides"), CASES)
def test_tokens_counts_areas_and_the_map_against_asking_one_by_one(grid, sides):
    m, _ = drawn(grid, sides)
    whole, candidates = undivided(m), Candidates(grid, sides, prefix=2)
    activity, areas = candidates.activity(whole), candidates.geometry(torch.device("cpu")).areas
    covering = candidates.on_patches(torch.arange(candidates.count).where(activity > 0.5, -1)).amax(1)
    rows, columns = (n * sides[1] for n in grid)
    assert activity.shape == (3, candidates.count)
    for b in range(3):
        tokens, questions = asking([level[b] for level in m], grid, sides)
        found = [2 + len(tokens), rows * columns]
        assert [activity[b].sum(), (activity[b] * areas).sum()] == found
        by_side = {level.side: level for level in candidates.levels}
        expected = torch.full((rows, columns), -1)
        for side, r, c in tokens:
            number = by_side[side].first + r * by_side[side].grid[1] + c
            assert activity[b, number] == 1
            assert areas[number] == side**2
            expected[r * side : r * side + side, c * side : c * side + side] = number
        assert torch.equal(covering[b], expected)
        sizes, k = token_sizes([u[b] for u in whole]), sides[1]
        assert torch.equal(
            torch.tensor(sides)[sizes].repeat_interleave(k, 0).repeat_interleave(k, 1), areas[expected].sqrt()
        )
        counts = [int(u[b].sum()) for u in whole]
        assert asked(grids_of(grid, sides), counts) == questions
        ratios = (sides[1], *(2 for _ in sides[2:]))
        assert len(tokens) == rows * columns - sum((k * k - 1) * n for k, n in zip(ratios, counts, strict=True))
    assert activity[:, :2].eq(1).all()


@pytest.mark.parametrize(("grid", "sides"), CASES)
def test_the_map_of_every_level(grid, sides):
    """Whether active or not: which token of each size lies over a fine patch."""
    candidates = Candidates(grid, sides, prefix=1)
    found = candidates.on_patches(torch.arange(candidates.count)[None])[0]
    for level, numbers in zip(candidates.levels, found, strict=True):
        for y in range(numbers.shape[0]):
            for x in range(numbers.shape[1]):
                r, c = y // level.side, x // level.side
                inside = r < level.grid[0] and c < level.grid[1]
                assert numbers[y, x] == (level.first + r * level.grid[1] + c if inside else -1)


@pytest.mark.parametrize(("grid", "sides"), CASES)
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_nested_values_cut_where_the_decisions_do(grid, sides, threshold):
    _, soft = drawn(grid, sides)
    cut = undivided([(s > threshold).float() for s in soft])
    for level, u in zip(nested(soft), cut, strict=True):
        assert torch.equal(level > threshold, u > 0.5)


@pytest.mark.parametrize(("grid", "sides"), CASES)
def test_gradients_are_those_of_turning_one_decision(grid, sides):
    """The slope of each candidate's activity by each decision, from the loops: it is what that flip would change."""
    m, _ = drawn(grid, sides, pictures=1)
    leaves = [level.clone().requires_grad_() for level in m]
    parts = torch.cat([part.flatten() for part in activity_of(undivided(leaves), sides[1])])
    weights = torch.randn(len(parts))
    (parts * weights).sum().backward()
    for level, leaf in zip(m, leaves, strict=True):
        for at in range(level.numel()):
            both = []
            for value in (0.0, 1.0):
                before = level.flatten()[at].item()
                level.view(-1)[at] = value
                both.append((torch.cat([p.flatten() for p in activity_of(undivided(m), sides[1])]) * weights).sum())
                level.view(-1)[at] = before
            assert leaf.grad.flatten()[at].item() == pytest.approx((both[1] - both[0]).item(), abs=1e-5)


@pytest.mark.parametrize(("grid", "sides"), CASES)
def test_flips_say_which_single_decision_would_bring_a_candidate(grid, sides):
    """By turning each decision in turn; nothing is left of what two stand against."""
    m, soft = drawn(grid, sides, pictures=1)

    def active():
        return torch.cat([part.flatten() for part in activity_of(undivided(m), sides[1])]) > 0.5

    before, expected = active(), torch.zeros(len(active()))
    expected[before] = 1.0
    for level, value in zip(m, soft, strict=True):
        for at in range(level.numel()):
            level.view(-1)[at] = 1 - level.view(-1)[at]
            now, s = active() & ~before, value.flatten()[at]
            expected[now] = s if level.flatten()[at] > 0.5 else 1 - s
            level.view(-1)[at] = 1 - level.view(-1)[at]
    found = torch.cat([part.flatten() for part in flips(m, soft, sides[1])])
    torch.testing.assert_close(found, expected)
    assert len(sides) == 2 or (found == 0).any()


@pytest.mark.parametrize(
    "scales", [(1,), (2, 4), (1, 2, 3), (1, 2, 8), (1, 4, 2), (1, 1), (1, 2.0, 4), 2, "1,2", (1, True)]
)
def test_scales_that_do_not_divide(scales):
    with pytest.raises(ValueError, match=r"scales=.*twice the one before.*use \(1, 2\), \(1, 2, 4\)"):
        checked_scales(scales)


def test_scales_that_do():
    assert checked_scales([1, 2, 4]) == (1, 2, 4)
    assert checked_scales((1, 3)) == (1, 3)
    assert checked_scales((1, 2, 4), 2) == (1, 2, 4)
    with pytest.raises(
        ValueError, match=r"2 sizes above the fine one, and the gate decides about 3; use .*\(1, 2, 4, 8\)"
    ):
        checked_scales((1, 2, 4), 3)


def test_levels_too_many_for_the_picture():
    check_room((1, 2, 4), (2, 5), 8, (32, 80))
    with pytest.raises(ValueError, match=r"8 fine patches of 8 px.* 32 x 80 px; use scales=\(1, 2, 4\), or .* 64 px"):
        check_room((1, 2, 4, 8), (2, 5), 8, (32, 80))
