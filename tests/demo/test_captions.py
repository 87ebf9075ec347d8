"""Caption accuracy: exact for images determined by captions, at chance for others, and summed over processes."""

import itertools
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from decm_lightning.data.pairs.captioned_images import Pairs
from decm_lightning.demo import CaptionProbe
from decm_lightning.demo.caption_probe import PENALTIES, CaptionAccuracy, Hits, embedding
from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics import FeatureMetrics, FeatureNetwork
from decm_lightning.metrics.metric import Counts, Prompts
from decm_lightning.text import EncodedCaptions
from decm_lightning.types import Batch, Captions

HELD = 40


class Pixels(FeatureNetwork):
    name = "the pixels"
    num_features = 27

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


class Data:
    """240 captions of one or two tokens and images whose pixels are a linear map of their embeddings, rounded."""

    def __init__(self, shuffled: bool = False):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.arange(240) % 2 + 1
        tokens = torch.randn(int(lengths.sum()), 12, generator=generator).half()
        captions = EncodedCaptions(tokens, lengths.cumsum(0), torch.arange(240))
        seen = captions
        if shuffled:
            order = torch.randperm(240, generator=generator)
            seen = EncodedCaptions(tokens, captions.ends, order)
        mixture = torch.randn(12, 27, generator=generator)
        images = (127 + 60 * embedding(seen.read(range(240))) @ mixture).round().clamp(0, 255).to(torch.uint8)
        self.train = Pairs(images.view(240, 3, 3, 3), captions, torch.arange(HELD, 240))
        self.reference = Pairs(images.view(240, 3, 3, 3), captions, torch.arange(HELD))

    def condition(self, rows, seed=0):
        return self.reference.condition(rows)


def read(batch: Batch) -> Batch:
    return Batch(to_uint8(batch.x_1), batch.condition)


def prepared(data) -> CaptionProbe:
    probe = CaptionProbe(Pixels())
    probe.prepare(data, read)
    return probe


def fractions(data, shift: int = 0) -> dict[str, float]:
    """Measure the held-out images as if each had been generated for the caption `shift` rows further on."""
    quality = FeatureMetrics(CaptionProbe(Pixels()))
    quality.prepare(data, read)
    batch = data.reference.__getitems__(range(HELD))
    condition = data.reference.condition([(row + shift) % HELD for row in range(HELD)])
    quality.update(to_uint8(batch.x_1), real=True, prompts=Prompts(batch.condition))
    quality.update(to_uint8(batch.x_1), real=False, prompts=Prompts(condition))
    return quality.compute() | {"note": next(iter(quality.describe().values()))}


def test_images_that_follow_from_their_captions_are_all_told_apart():
    found = fractions(Data())
    assert (found["caption_top1"], found["caption_top5"]) == (1, 1)
    assert "40 held-out captions, chance 0.025 and 0.125, real images 1 and 1" in found["note"]
    assert "200 real training pairs" in found["note"]


def test_images_of_other_captions_are_not_taken_for_their_own():
    found = fractions(Data(), shift=7)
    assert found["caption_top1"] == 0
    assert "real images 1 and 1" in found["note"]


def test_shuffled_captions_give_chance():
    """The mean over all pairings of images and captions is exactly k / n; a single pairing is near it."""
    found = fractions(Data(shuffled=True))
    assert found["caption_top1"] <= 0.15
    assert found["caption_top5"] <= 0.35
    everything = [fractions(Data(shuffled=True), shift) for shift in range(HELD)]
    assert sum(one["caption_top1"] for one in everything) / HELD == pytest.approx(1 / HELD)
    assert sum(one["caption_top5"] for one in everything) / HELD == pytest.approx(5 / HELD)


def test_the_probe_is_the_ridge_regression_of_its_formula():
    data = Data()
    probe = prepared(data)
    batch = data.train.__getitems__(range(200))
    x = to_uint8(batch.x_1).flatten(1).double()
    y = embedding(batch.condition).double()
    x, y = x - x.mean(0), y - y.mean(0)
    weight = torch.linalg.solve(x.T @ x + probe.penalty * torch.eye(27), x.T @ y).T
    torch.testing.assert_close(probe.weight.double(), weight, rtol=1e-4, atol=1e-7)

    held = data.reference.__getitems__(range(HELD))
    guessed = (to_uint8(held.x_1).flatten(1).double() - probe.x_mean) @ weight.T
    expected = embedding(held.condition).double() - probe.y_mean
    scores = normalize(guessed, dim=1) @ normalize(expected, dim=1).T
    expected = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(scores.tolist())]
    assert probe.ranks(probe(to_uint8(held.x_1)), embedding(held.condition)).tolist() == expected


def leave_one_out(x: Tensor, y: Tensor, penalty: float) -> float:
    """The leave-one-out error: one regression per row, fitted without it."""
    total = 0.0
    for row in range(len(x)):
        kept = torch.arange(len(x)) != row
        centre, middle = x[kept].mean(0), y[kept].mean(0)
        a, b = x[kept] - centre, y[kept] - middle
        weight = torch.linalg.solve(a.T @ a + penalty * torch.eye(x.shape[1]), a.T @ b)
        total += float((y[row] - middle - (x[row] - centre) @ weight).square().sum())
    return total


def test_the_penalty_has_the_least_leave_one_out_error(generator):
    """With few rows, it matters that the means are fitted too; this is checked with few and with many rows."""
    chosen = set()
    for rows in (4, 5, 6, 7, 8, 12, 60):
        x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)
        y += 2 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        probe = CaptionProbe(Pixels())
        probe.fit(x, y, y)
        assert probe.penalty == min(PENALTIES, key=partial(leave_one_out, x, y))
        chosen.add(probe.penalty)
    assert len(chosen) > 2


def test_ties_and_nan_are_never_in_an_images_favour():
    data = Data()
    probe = prepared(data)
    captions = embedding(data.reference.condition(range(3)))
    assert probe.ranks(torch.full((3, 27), torch.nan), captions).tolist() == [HELD - 1] * 3
    probe.weight = torch.zeros_like(probe.weight)
    assert probe.ranks(torch.ones(3, 27), captions).tolist() == [HELD - 1] * 3


def test_the_same_caption_twice_is_one_candidate():
    data = Data()
    data.reference.rows = torch.tensor([0, 1, 2, 0])
    assert len(prepared(data).candidates) == 3


def test_the_embedding_is_the_mean_of_the_tokens_that_are_there():
    tokens = torch.tensor([[[3.0, 0.0], [1.0, 2.0]], [[0.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[2.0, 1.0], [0.0, 5**0.5]]) / 5**0.5
    torch.testing.assert_close(embedding(Captions(tokens, mask)), expected)
    torch.testing.assert_close(embedding(Captions(tokens[:1])), expected[:1])


def test_a_reference_without_captions_leaves_the_real_share_unknown():
    data = Data()
    probe = prepared(data)
    part = CaptionAccuracy(probe)
    batch = data.reference.__getitems__(range(HELD))
    views = {"features": probe(to_uint8(batch.x_1))}
    part.update(views, True, Prompts())
    part.update(views, False, Prompts(batch.condition))
    assert part.compute(Counts(0, HELD), 0) == {"caption_top1": 1, "caption_top5": 1}
    assert "real images unknown" in part.describe(Counts(0, HELD))


def test_reset_forgets_generated_images_only():
    hits = Hits((1, 2))
    hits.update(torch.tensor([0, 1, 2, 3]), True)
    hits.update(torch.tensor([0, 0]), False)
    assert hits.compute().tolist() == [[0.25, 0.5], [1, 1]]
    hits.reset()
    hits.update(torch.tensor([5]), False)
    assert hits.compute().tolist() == [[0.25, 0.5], [0, 0]]


def test_batches_add_up():
    """Counts are summed over processes, not fractions."""
    ranks = torch.tensor([0, 3, 1, 0, 7, 0, 0])
    whole = Hits((1, 5))
    whole.update(ranks, False)
    parts = Hits((1, 5))
    for first, last in itertools.pairwise((0, 2, 2, 7)):
        parts.update(ranks[first:last], False)
    assert torch.equal(whole.hits, parts.hits)
    assert torch.equal(whole.seen, parts.seen)


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"got object, .*demo\.Emoji"):
        CaptionProbe(Pixels()).prepare(object(), read)
    with pytest.raises(ValueError, match="captions: got Tensor"):
        embedding(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"pairs.*got 1"):
        CaptionProbe(Pixels(), pairs=1)
    data = Data()
    probe = prepared(data)
    foreign = embedding(data.train.condition([0, 1]))
    with pytest.raises(ValueError, match=r"caption \d of the batch .* 40 "):
        probe.ranks(torch.zeros(2, 27), foreign)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*'demo'"):
        prepared(Data())
