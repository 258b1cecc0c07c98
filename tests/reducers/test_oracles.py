"""Each reducer against its definition in plain loops: 200 random batches each, of unequal pictures, ties among them."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from msvit.core.attention import Layout, attend
from msvit.core.attention_weights import attend_watched, attention_of_first
from msvit.core.tokens import Tokens
from msvit.reducers.base import merge
from msvit.reducers.registry import EViT, GridPooling, PiToMe, PowerBert, RandomPruning, TokenPooling, ToMe

CASES = 200
WIDTH, PREFIX = 6, 2


@pytest.fixture(scope="module")
def vit():
    """A backbone with a class token and a register, for its numbers alone."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=6, depth=4, num_heads=2, reg_tokens=1)


def random_tokens(case, activity=None):
    """Float64 tokens of one to three pictures. Every second case has small whole numbers, so that there are exact ties.

    Each patch token covers one to three fine patches of a 4 x 12 grid, one after the other.
    """
    torch.manual_seed(case)
    lengths = [PREFIX + int(torch.randint(2, 13, ())) for _ in range(1 + case % 3)]
    if case % 5 == 0:
        lengths = [lengths[0]] * len(lengths)
    total = sum(lengths)
    x = torch.randn(total, WIDTH, dtype=torch.float64)
    if case % 2:
        x = torch.randint(-1, 2, (total, WIDTH)).double()
    layout = Layout(lengths, torch.device("cpu"))
    where, area = torch.full((len(lengths), 48), -1), torch.zeros(total)
    for b, n in enumerate(lengths):
        place = 0
        for i in range(PREFIX, n):
            row = int(layout.ends[b]) + i
            area[row] = int(torch.randint(1, 4, ()))
            where[b, place : place + int(area[row])] = row
            place += int(area[row])
    return Tokens(x, activity, area, where.view(-1, 4, 12), layout)


def random_scores(tokens, case):
    """Positive float64 scores, `[T]`; with ties in every second case."""
    n = len(tokens.x)
    return torch.randint(1, 5, (n,)).double() if case % 2 else torch.rand(n, dtype=torch.float64) + 0.01


def pictures(tokens):
    ends = tokens.layout.ends.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def kept_of(keep, n):
    return max(1, math.floor(keep * n + 0.5))


def top(scores, rows, k):
    """The k rows with the highest scores, of equals the first, in order."""
    return sorted(sorted(rows, key=lambda r: (-float(scores[r]), r))[:k])


def check(reduced, before, groups, values, areas=None):
    """New rows are `groups` of old ones, in order over all pictures, with these values; pixels follow their token."""
    assert reduced.layout.lengths == [len(g) for g in groups]
    flat = [members for g in groups for members in g]
    torch.testing.assert_close(reduced.x, torch.stack(values), rtol=1e-9, atol=1e-11)
    home = {old: new for new, members in enumerate(flat) for old in members}
    for was, now in zip(before.where.flatten().tolist(), reduced.where.flatten().tolist(), strict=True):
        assert now == (home.get(was, -1) if was >= 0 else -1)
    expected = [sum(float(before.area[r]) for r in members) for members in flat]
    assert reduced.area.tolist() == (expected if areas is None else areas)


@pytest.mark.parametrize("keep", [0.3, 0.7])
@pytest.mark.long
def test_power_bert_keeps_the_most_significant(vit, keep):
    reducer = PowerBert(vit, keep=keep)
    for case in range(CASES):
        tokens = random_tokens(case)
        scores = random_scores(tokens, case)
        groups, values = [], []
        for first, last in pictures(tokens):
            patches = range(first + PREFIX, last)
            rows = [*range(first, first + PREFIX), *top(scores, patches, kept_of(keep, len(patches)))]
            groups.append([[r] for r in rows])
            values += [tokens.x[r] for r in rows]
        check(reducer.reduce(1, tokens, scores), tokens, groups, values)


@pytest.mark.long
def test_random_pruning_keeps_a_random_subset(vit):
    reducer = RandomPruning(vit, keep=0.5).eval()
    sets = set()
    for case in range(CASES):
        tokens = random_tokens(case)
        reduced = reducer.reduce(1, tokens, None)
        kept = [[r] for r in range(len(tokens.x)) if any((tokens.x[r] == x).all() for x in reduced.x)]
        if case % 2 == 0:  # without ties a row is known by its value
            groups, start = [], 0
            for n, (first, last) in zip(reduced.layout.lengths, pictures(tokens), strict=True):
                groups.append(kept[start : start + n])
                start += n
                assert n == PREFIX + kept_of(0.5, last - first - PREFIX)
                assert [r for [r] in groups[-1][:PREFIX]] == list(range(first, first + PREFIX))
            check(reduced, tokens, groups, [tokens.x[r] for [r] in kept])
        assert torch.equal(reducer.reduce(1, tokens, None).x, reduced.x)
        sets.add(tuple(reduced.where.flatten().tolist()))
    assert len(sets) > CASES / 4


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.long
def test_evit_fuses_the_rest(vit, fuse):
    reducer = EViT(vit, keep=0.6, fuse=fuse)
    for case in range(CASES):
        tokens = random_tokens(case)
        scores = random_scores(tokens, case)
        groups, values = [], []
        for first, last in pictures(tokens):
            patches = list(range(first + PREFIX, last))
            kept = top(scores, patches, math.ceil(0.6 * len(patches)))
            rest = [r for r in patches if r not in kept]
            rows = [*range(first, first + PREFIX), *kept]
            groups.append([[r] for r in rows] + ([rest] if fuse and rest else []))
            values += [tokens.x[r] for r in rows]
            if fuse and rest:
                values.append(sum(scores[r] * tokens.x[r] for r in rest))
        check(reducer.reduce(1, tokens, scores), tokens, groups, values)


def matched(keys, first, last, r):
    """ToMe's matching of one picture: the row that each row of `first` ... `last - 1` ends in."""
    rows = list(range(first, last))
    target = {row: row for row in rows}
    a = [row for i, row in enumerate(rows) if i % 2 == 0 and i >= PREFIX]
    b = [row for i, row in enumerate(rows) if i % 2 == 1 and i >= PREFIX]
    edges = []
    for i in a:
        best, partner = -2.0, None
        for j in b:
            length = float(keys[i].norm() * keys[j].norm())
            cosine = float(keys[i] @ keys[j]) / length if length else 0.0
            if cosine > best:
                best, partner = cosine, j
        edges.append((-best, i, partner))
    for _, i, j in sorted(edges)[: min(r, len(rows[PREFIX:]) // 2)]:
        target[i] = j
    return target


def published_order(first, target):
    """The rows that stay: prefix tokens, others with even numbers, others with odd ones."""
    stay = sorted(row for row in target if target[row] == row)
    return sorted(stay, key=lambda row: (row - first) % 2 if row >= first + PREFIX else 0)


@pytest.mark.parametrize("order", ["published", "picture"])
@pytest.mark.parametrize("r", [1, 3, 50])
@pytest.mark.long
def test_tome_merges_the_best_edges(vit, r, order):
    reducer = ToMe(vit, r=r, order=order)
    for case in range(CASES):
        tokens = random_tokens(case)
        # With ties: unit vectors along the axes, whose cosines are exactly 0 and ±1.
        keys = torch.randn(len(tokens.x), 3, dtype=torch.float64)
        if case % 2:
            keys = torch.eye(3, dtype=torch.float64)[torch.randint(3, (len(keys),))] * (-1) ** torch.randint(
                2, (len(keys), 1)
            )
        size = torch.ones(len(keys)) if case % 3 else torch.randint(1, 4, (len(keys),)).float()
        groups, values, sizes = [], [], []
        for first, last in pictures(tokens):
            target = matched(keys, first, last, r)
            stay = published_order(first, target) if order == "published" else sorted(set(target.values()))
            groups.append([[i for i in target if target[i] == row] for row in stay])
            for members in groups[-1]:
                sizes.append(sum(float(size[i]) for i in members))
                values.append(sum(float(size[i]) * tokens.x[i] for i in members) / sizes[-1])
        given = Tokens(tokens.x, None, tokens.area, tokens.where, tokens.layout, None if case % 3 else size)
        reduced = reducer.reduce(1, given, keys)
        check(reduced, tokens, groups, values)
        assert reduced.size.tolist() == sizes


def protected(keys, first, last, margin, keep):
    """PiToMe's matching of one picture: the row that each row of `first` ... `last - 1` ends in."""
    rows, target = list(range(first + PREFIX, last)), {row: row for row in range(first, last)}

    def cosine(i, j):
        length = float(keys[i].norm() * keys[j].norm())
        return float(keys[i] @ keys[j]) / length if length else 0.0

    def energy(i):
        values = [cosine(i, j) for j in rows]
        return sum(x if x >= margin else math.exp(x - margin) - 1 for x in values) / len(values)

    order = sorted(rows, key=energy, reverse=True)
    k = min(math.floor(len(rows) - keep * len(rows)), len(rows) // 2)
    a, b = order[0 : 2 * k : 2], order[1 : 2 * k : 2]
    for i in a:
        target[i] = max(b, key=lambda j: cosine(i, j))
    return target


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.long
def test_pitome_merges_what_has_many_like_it(vit, keep, layer):
    reducer = PiToMe(vit, keep=keep)
    for case in range(0, CASES, 2):
        tokens = random_tokens(case)
        keys = torch.randn(len(tokens.x), 3, dtype=torch.float64)
        size = torch.ones(len(keys)) if case % 3 else torch.randint(1, 4, (len(keys),)).float()
        groups, values, sizes = [], [], []
        for first, last in pictures(tokens):
            target = protected(keys, first, last, 0.9 - 0.9 * layer / 4, keep)
            groups.append([[i for i in target if target[i] == row] for row in sorted(set(target.values()))])
            for members in groups[-1]:
                sizes.append(sum(float(size[i]) for i in members))
                values.append(sum(float(size[i]) * tokens.x[i] for i in members) / sizes[-1])
        given = Tokens(tokens.x, None, tokens.area, tokens.where, tokens.layout, None if case % 3 else size)
        reduced = reducer.reduce(layer, given, keys)
        check(reduced, tokens, groups, values)
        assert sizes == ([1.0] * len(sizes) if reduced.size is None else reduced.size.tolist())
        assert reduced.layout.lengths == reducer.lengths(layer, tokens.layout)


def clustered(x, weight, significance, rows, k, method, iterations):
    """Lloyd's algorithm from the k most significant rows: the index of each row's cluster, and centres."""
    starts = top(significance, rows, k)
    centres = [x[r] for r in starts]
    medoids = list(starts)

    def assign():
        found = {}
        for r in rows:
            distances = [float((x[r] - c).square().sum()) for c in centres]
            found[r] = min(range(k), key=lambda j: (round(distances[j], 9), j))
        return found

    assignment = assign()
    for step in range(iterations):
        for j in range(k):
            members = [r for r in rows if assignment[r] == j]
            if method == "kmeans":
                mass = sum(float(weight[r]) for r in members)
                centres[j] = sum(float(weight[r]) * x[r] for r in members) / mass if members else x[starts[j]]
            elif members and step < iterations - 1:
                costs = [sum(float(weight[s]) * float((x[r] - x[s]).square().sum()) for s in members) for r in members]
                medoids[j] = members[min(range(len(members)), key=lambda i: (round(costs[i], 9), i))]
                centres[j] = x[medoids[j]]
        if step < iterations - 1:
            assignment = assign()
    return assignment, centres


@pytest.mark.parametrize("method", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.long
def test_token_pooling_is_lloyds_algorithm(vit, method, weighted):
    reducer = TokenPooling(vit, keep=0.45, method=method, weighted=weighted, iterations=3)
    for case in range(CASES):
        tokens = random_tokens(case)
        scores = random_scores(tokens, case)
        weight = scores if weighted else torch.ones_like(scores)
        groups, values = [], []
        for first, last in pictures(tokens):
            rows = list(range(first + PREFIX, last))
            k = kept_of(0.45, len(rows))
            assignment, centres = clustered(tokens.x, weight, scores, rows, k, method, 3)
            clusters = [[r for r in rows if assignment[r] == j] for j in range(k)]
            groups.append([[r] for r in range(first, first + PREFIX)] + clusters)
            values += [tokens.x[r] for r in range(first, first + PREFIX)] + centres
        check(reducer.reduce(1, tokens, scores), tokens, groups, values)


@pytest.mark.long
def test_grid_pooling_averages_cells(vit):
    reducer = GridPooling(vit, stride=2, layers=[1, 2])
    for case in range(CASES):
        tokens = random_tokens(case)
        for layer, side in ((1, 2), (2, 4)):
            groups, values = [], []
            for b, (first, last) in enumerate(pictures(tokens)):
                cells = {}
                for row in range(first, last):
                    places = (tokens.where[b] == row).nonzero().tolist()
                    cell = (places[0][0] // side, places[0][1] // side) if places else ("prefix", row)
                    cells.setdefault(cell, []).append(row)
                groups.append(list(cells.values()))
                for members in groups[-1]:
                    mass = [max(1.0, float(tokens.area[r])) for r in members]
                    parts = [m * tokens.x[r] for m, r in zip(mass, members, strict=True)]
                    values.append(sum(parts) / sum(mass))
            check(reducer.reduce(layer, tokens, None), tokens, groups, values)


def test_merging_weighs_by_activity():
    """x_n = sum w a x / sum w a and a_n = sum w a / sum w, also between 0 and 1: so are the gradients."""
    for case in range(40):
        tokens = random_tokens(case)
        activity = torch.rand(len(tokens.x), dtype=torch.float64)
        tokens = Tokens(tokens.x, activity, tokens.area, tokens.where, tokens.layout)
        weight = torch.rand(len(tokens.x), dtype=torch.float64) + 0.1
        into, lengths = [], []
        for first, last in pictures(tokens):
            lengths.append(3)
            start = 3 * (len(lengths) - 1)
            into += [start + (r if r < 3 else int(torch.randint(3, ()))) for r in range(last - first)]
        merged = merge(tokens, torch.tensor(into), lengths, weight)
        for n in range(sum(lengths)):
            rows = [r for r, target in enumerate(into) if target == n]
            mass = sum(weight[r] * activity[r] for r in rows)
            torch.testing.assert_close(merged.x[n], sum(weight[r] * activity[r] * tokens.x[r] for r in rows) / mass)
            torch.testing.assert_close(merged.activity[n], mass / sum(weight[r] for r in rows))


@pytest.mark.parametrize("weighted", [False, True])
def test_attention_that_is_watched_is_attention(weighted):
    """Output as always; received is the column sum of the mean over the heads, given each picture's first row."""
    for case in range(40):
        torch.manual_seed(case)
        lengths = [4, 4] if case % 2 else [3, 7, 1]
        layout = Layout(lengths, torch.device("cpu"))
        q, k, v = torch.randn(3, sum(lengths), 2, 3, dtype=torch.float64)
        weight = torch.randint(0, 3, (sum(lengths),)).double() if weighted else None
        if weighted:
            weight[layout.ends[:-1]] = 1.0
        out, seen = attend_watched(layout, q, k, v, weight)
        torch.testing.assert_close(out, attend(layout, q, k, v, weight))
        received, given = torch.zeros(2, sum(lengths), dtype=torch.float64)
        for first, last in zip(layout.ends.tolist()[:-1], layout.ends.tolist()[1:], strict=True):
            for i in range(first, last):
                for head in range(2):
                    e = [float((q[i, head] @ k[j, head] / 3**0.5).exp()) for j in range(first, last)]
                    e = [x * (1.0 if weight is None else float(weight[first + n])) for n, x in enumerate(e)]
                    for j in range(first, last):
                        if weight is None or weight[i] > 0:
                            received[j] += e[j - first] / sum(e) / 2
                        if i == first:
                            given[j] += e[j - first] / sum(e) / 2
        torch.testing.assert_close(seen, received)
        torch.testing.assert_close(attention_of_first(layout, q, k, weight), given)


def nearest(patches, centres):
    """The nearest centre of each token."""
    return centres[torch.cdist(patches, centres).argmin(1)]


def rivals_of(patches, significance, side):
    """What K = N / 4 tokens by other means make of every token: the nearest of a choice, or the average of its cell."""
    grid, half, k = patches.view(side, side, -1), side // 2, len(patches) // 4
    choices = {
        "most significant": patches[significance.topk(k).indices],
        "random": patches[torch.randperm(len(patches))[:k]],
        "strided": grid[::2, ::2].flatten(0, 1),
    }
    cells = grid.unflatten(1, (half, 2)).unflatten(0, (half, 2)).mean((1, 3))
    return {name: nearest(patches, centres) for name, centres in choices.items()} | {
        "grid": cells.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 1),
        "nearest average of the grid": nearest(patches, cells.flatten(0, 1)),
    }


def pictures_of(kind, side=8):
    """Patch tokens of many pictures, behind prefix tokens."""
    for case in range(CASES):
        torch.manual_seed(case)
        x = torch.randn(PREFIX + side**2, 6)
        if kind == "groups":
            x = torch.randn(20, 6)[torch.randint(20, (len(x),))] + 0.5 * x
        elif kind == "smooth":  # what lies side by side is alike, as in a picture
            grid = torch.nn.functional.avg_pool2d(torch.randn(1, 6, side + 2, side + 2), 3, 1) * 3
            x = torch.cat([x[:PREFIX], grid[0].flatten(1).T])
        yield x


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["kmeans", "kmedoids"])
@pytest.mark.parametrize("kind", ["normal", "groups", "smooth"])
@pytest.mark.long
def test_clusters_lose_less_than_what_they_are_compared_with(vit, method, kind, weighted):
    """The error sum_i w_i |x_i - what became of x_i|².

    That of K-means is never larger than that of the most significant, random or strided tokens or of grid pooling, and
    over the cases together smaller still than if tokens could choose among the grid's averages. K-medoids, whose
    centres must be tokens, is never worse than the most significant, where it begins, and beats choices over all.
    """
    reducer = TokenPooling(vit, clusters=[16], layers=[1], method=method, weighted=weighted)
    n, side, totals = 64, 8, {}
    for x in pictures_of(kind):
        where = torch.arange(PREFIX, PREFIX + n).view(1, side, side)
        tokens = Tokens(x, None, torch.ones(PREFIX + n), where, Layout([PREFIX + n], torch.device("cpu")))
        significance, patches = torch.rand(PREFIX + n), x[PREFIX:]
        pooled = reducer.reduce(1, tokens, significance)
        weight = significance[PREFIX:] if weighted else torch.ones(n)
        became = {"own": pooled.x[pooled.where[0].flatten()]} | rivals_of(patches, significance[PREFIX:], side)
        errors = {name: float((weight * (patches - y).square().sum(1)).sum()) for name, y in became.items()}
        never = ["most significant"] + (["random", "strided", "grid"] if method == "kmeans" else [])
        assert errors["own"] <= min(errors[name] for name in never) * (1 + 1e-5)
        totals = {name: totals.get(name, 0) + error for name, error in errors.items()}
    own = totals.pop("own")
    if method == "kmedoids":
        totals = {name: total for name, total in totals.items() if "grid" not in name}
    assert own < min(totals.values())


def test_the_best_medoids_there_are_can_lose_more_than_a_grid_of_averages():
    """Why K-medoids is not held to grid pooling: all choices of 4 out of 16 smooth tokens are tried."""
    choices = torch.combinations(torch.arange(16), 4)
    worse = 0
    for case in range(50):
        torch.manual_seed(case)
        grid = torch.nn.functional.avg_pool2d(torch.randn(1, 6, 6, 6), 3, 1)[0].flatten(1).T
        best = torch.cdist(grid, grid).square()[choices].amin(1).sum(1).min()
        cells = rivals_of(grid, torch.rand(16), 4)["grid"]
        worse += bool(best > (grid - cells).square().sum())
    assert worse > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["kmeans", "kmedoids"])
@pytest.mark.long
def test_no_iteration_makes_the_sum_larger(vit, method, weighted):
    """sum_i w_i |x_i - c_a(i)|² over the iterations."""
    gain = 0.0
    for case in range(30):
        torch.manual_seed(case)
        x, scores = (
            torch.randn(PREFIX + 40, 6, dtype=torch.float64),
            torch.rand(PREFIX + 40, dtype=torch.float64),
        )
        where = torch.arange(PREFIX, PREFIX + 40).view(1, 4, 10)
        tokens = Tokens(x, None, torch.ones(PREFIX + 40), where, Layout([PREFIX + 40], torch.device("cpu")))
        weight = scores[PREFIX:] if weighted else torch.ones(40)
        sums = []
        for iterations in range(1, 7):
            reducer = TokenPooling(vit, 0.3, layers=[1], method=method, weighted=weighted, iterations=iterations)
            pooled = reducer.reduce(1, tokens, scores)
            centre = pooled.x[pooled.where[0].flatten()]
            sums.append(float((weight * (x[PREFIX:] - centre).square().sum(1)).sum()))
        assert all(b <= a * (1 + 1e-9) for a, b in zip(sums[:-1], sums[1:], strict=True))
        gain += sums[0] - sums[-1]
    assert gain > 0
