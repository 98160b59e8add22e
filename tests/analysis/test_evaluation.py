"The evaluation chapter against scikit-learn, SciPy, the literature, and simulations whose truth is known."
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import bootstrap
from sklearn import metrics as sk

from conftest import random_case
from grocery_nb import evaluation
from grocery_nb.analysis import calibration, comparison, hierarchy, intervals, metrics, scores
from grocery_nb.analysis.comparison_page import disagreement_gallery
from grocery_nb.core import GroceryError

# One name for what the chapter hands on and the parts that it keeps to themselves.
ev = SimpleNamespace(**{name: getattr(part, name) for part in (metrics, intervals, scores, hierarchy, calibration, comparison, evaluation) for name in part.__all__})


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed):
    logits, labels = random_case(seed)
    classes, answers = logits.shape[1], logits.argmax(axis=1)
    e = ev.evaluate_logits(logits, labels)
    every, present = np.arange(classes), np.unique(labels)
    assert abs(e.top1 - sk.accuracy_score(labels, answers)) < 1e-12
    for k in (1, 2, 5, classes - 1):
        expected = sk.top_k_accuracy_score(labels, logits, k=k, labels=every)
        assert abs(ev.topk_accuracy(logits, labels, k) - expected) < 1e-12
    np.testing.assert_array_equal(e.matrix, sk.confusion_matrix(labels, answers, labels=every))
    np.testing.assert_allclose(ev.confusion_rates(e.matrix).rate[present],
                               sk.confusion_matrix(labels, answers, labels=every, normalize="true")[present], atol=1e-12)
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, answers, labels=every, zero_division=np.nan)
    np.testing.assert_allclose([s.precision for s in e.per_class], precision, atol=1e-12)
    np.testing.assert_allclose([s.recall for s in e.per_class], recall, atol=1e-12)
    np.testing.assert_array_equal([s.support for s in e.per_class], support)
    np.testing.assert_allclose([e.per_class[i].f1 for i in present], f1[present], atol=1e-12)
    assert abs(e.macro_f1 - sk.f1_score(labels, answers, labels=present, average="macro")) < 1e-12
    assert abs(e.macro_recall - sk.recall_score(labels, answers, labels=present, average="macro")) < 1e-12
    assert e.absent == tuple(f"class {i}" for i in sorted(set(every) - set(present)))


def test_softmax_and_mistakes_by_another_road():
    logits, labels = random_case(9)
    np.testing.assert_allclose(ev.softmax(logits), np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-12)
    worst = ev.worst_mistakes(logits, labels, limit=10_000)
    assert len(worst) == round((1 - ev.accuracy(logits, labels)) * len(labels))
    assert [p for _, _, p in worst] == sorted((p for _, _, p in worst), reverse=True)
    assert all(labels[row] != answer == logits[row].argmax() for row, answer, _ in worst)


@pytest.mark.parametrize("hits, n, low, high", [
    # Newcombe, R. G. (1998), Statistics in Medicine 17, 857-872, Table I, method 3 (score interval, Wilson 1927), 95%
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_equals_the_literature(hits, n, low, high):
    assert [round(end, 4) for end in ev.wilson_interval(hits, n)] == [low, high]


def test_wilson_ends_solve_the_equation_they_come_from():
    z = 1.959963984540054
    for hits, n in [(0, 1), (1, 1), (3, 10), (10, 10), (7, 1_000_000)]:
        for p in ev.wilson_interval(hits, n):
            assert 0 <= p <= 1 and abs((hits / n - p) ** 2 - z * z * p * (1 - p) / n) < 1e-12
    wide, narrow = ev.wilson_interval(8, 10, 0.99), ev.wilson_interval(8, 10, 0.5)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


@pytest.mark.parametrize("call, words", [
    (lambda: ev.accuracy([[0., float("nan")]], [0]), "nan"),
    (lambda: ev.accuracy([[0., float("inf")]], [0]), "inf"),
    (lambda: ev.accuracy([[-np.inf, -np.inf]], [0]), "inf"),
    (lambda: ev.accuracy(np.zeros((0, 3)), []), "shape"),
    (lambda: ev.accuracy(np.zeros((2, 3, 1)), [0, 1]), "shape"),
    (lambda: ev.accuracy([["a", "b"]], [0]), "no array of numbers"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0, 3]), "hold 3 at position 1"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [-1, 0]), "hold -1 at position 0"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0., 1.]), "float64"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [[0], [1]]), "shape"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0]), "2 rows of logits for 1 labels"),
    (lambda: ev.topk_accuracy(np.zeros((2, 3)), [0, 1], 4), "k is 4"),
    (lambda: ev.topk_accuracy(np.zeros((2, 3)), [0, 1], 0), "k is 0"),
    (lambda: ev.confusion_matrix([0, 1], [0, 5], 3), "predictions hold 5"),
    (lambda: ev.evaluate_logits(np.zeros((2, 3)), [0, 1], ["a"]), "1 class names for 3 classes"),
    (lambda: ev.evaluate_logits(np.zeros((2, 3)), [0, 1], {1: "a", 2: "b", 3: "c"}), "ids 0 to 2"),
    (lambda: ev.confusion_rates(np.zeros((3, 3))), "type float64"),
    (lambda: ev.wilson_interval(3, 2), "more hits"),
    (lambda: ev.wilson_interval(1, 2, 0), "confidence"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(ev.EvaluationError, match=re.escape(words)) as caught: call()
    assert isinstance(caught.value, GroceryError) and isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_metrics_are_json_and_the_text_has_everything():
    logits, labels = random_case(1)
    e = ev.evaluate_logits(logits, labels, {i: f"kind {i}" for i in range(12)})
    assert json.loads(json.dumps(e.metrics(), allow_nan=False)) == e.metrics()
    assert e.metrics()["classes_present"] == 9 and e.metrics()["top1_low"] < e.metrics()["top1"] < e.metrics()["top1_high"]
    assert all(f"kind {i}" in str(e) for i in range(12)) and "No photos of 3 classes" in str(e)
    assert re.search(r"kind 1 .*-", str(e)) and "nan" not in str(e)


def test_few_classes_and_few_photos():
    e = ev.evaluate_logits([[2., 1.]], [0])
    assert (e.top1, e.top5, e.macro_f1, e.absent) == (1, 1, 1, ("class 1",))
    assert e.confusions == () and json.dumps(e.metrics(), allow_nan=False)


def stretched(photos: int, seed: int, stretch: float = 1.0, classes: int = 15):
    "Logits whose true temperature is `stretch`, and labels drawn from the honest probabilities"
    rng = np.random.default_rng(seed)
    honest = 4 * rng.normal(size=(photos, classes))
    shares = np.exp(honest - logsumexp(honest, axis=1, keepdims=True))
    return stretch * honest, (shares.cumsum(axis=1) > rng.random((photos, 1))).argmax(axis=1)


# Intervals

def test_bootstrap_equals_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=80), rng.normal(size=80)
    b += a
    def correlation(x, y): return np.corrcoef(x, y)[0, 1]
    theirs = bootstrap((a, b), correlation, paired=True, vectorized=False, method="percentile", n_resamples=3000, random_state=0)
    np.testing.assert_allclose(ev.bootstrap_interval(correlation, a, b, resamples=3000), theirs.confidence_interval, atol=0.015)
    wide, narrow = (ev.bootstrap_interval(np.median, a, confidence=c) for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < np.median(a) < narrow[1] < wide[1]
    three, again, four = (ev.bootstrap_interval(np.mean, a, seed=seed) for seed in (3, 3, 4))
    assert three == again != four


def test_bootstrap_keeps_its_promise():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = ev.bootstrap_interval(np.mean, rng.exponential(size=150), resamples=300)
        held += low <= 1 <= high
    assert 0.90 <= held / 200 <= 0.98


@pytest.mark.parametrize("p", [0.8, 0.97, 0.995, 1.0])
def test_shares_keep_their_promise(p):
    right = np.random.default_rng(0).random((100, 300)) < p
    held = [low <= p <= high for low, high in (ev.share_interval(row) for row in right)]
    assert np.mean(held) >= 0.9


def test_share_interval_is_wilson_where_the_bootstrap_lies():
    for hits in (0, 3, 97, 100): assert ev.share_interval(np.arange(100) < hits) == ev.wilson_interval(hits, 100)
    low, high = ev.share_interval(np.arange(100) < 80)
    assert (low, high) != ev.wilson_interval(80, 100) and abs(low - 0.72) < 0.015 and abs(high - 0.88) < 0.015


def test_macro_of_cells_equals_scikit_learn():
    logits, labels = random_case(4)
    rows = np.random.default_rng(1).integers(0, 200, size=(5, 200))
    answers = logits.argmax(axis=1)
    true, said = (part.ravel() for part in np.indices((12, 12)))
    cells = np.array([np.bincount(labels[r] * 12 + answers[r], minlength=144) for r in rows])
    for r, (recall, f1) in zip(rows, ev.macro_of_cells(cells, true, said, 12)):
        present = np.unique(labels[r])
        assert abs(recall - sk.recall_score(labels[r], answers[r], labels=present, average="macro")) < 1e-12
        assert abs(f1 - sk.f1_score(labels[r], answers[r], labels=present, average="macro")) < 1e-12


def test_macro_intervals_equal_the_slow_way_and_hold_the_estimate():
    logits, labels = random_case(5, absent=2)
    e, answers = ev.evaluate_logits(logits, labels), logits.argmax(axis=1)
    def slow(name): return lambda y, a: getattr(sk, name)(y, a, labels=np.unique(y), average="macro", zero_division=0)
    recall = ev.bootstrap_interval(slow("recall_score"), labels, answers, resamples=300)
    np.testing.assert_allclose(recall, e.macro_recall_interval, atol=0.02)
    assert e.macro_recall_interval[0] < e.macro_recall < e.macro_recall_interval[1]
    perfect = ev.evaluate_logits(np.eye(3)[[0, 0, 0, 0, 1, 2]], [0, 0, 0, 0, 1, 2])
    assert perfect.macro_f1_interval == ev.wilson_interval(4.0, 4.0) == perfect.macro_recall_interval  # 9 / (1/4 + 1 + 1) = 4 photos
    assert perfect.top1_interval == ev.wilson_interval(6, 6)


def test_a_large_evaluation_is_made_at_once():
    logits, labels = stretched(3000, 0, classes=81)
    first, again = ev.evaluate_logits(logits, labels), ev.evaluate_logits(logits, labels)
    assert first.metrics() == again.metrics() and json.dumps(first.metrics(), allow_nan=False)


# Fine within coarse

@pytest.mark.parametrize("seed", range(3))
def test_coarse_equals_sums_of_probabilities(seed):
    rng = np.random.default_rng(seed)
    logits, labels = random_case(seed, absent=0)
    table = np.concatenate([np.arange(5), rng.integers(0, 5, size=7)])
    shares = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    sums = np.stack([shares[:, table == k].sum(axis=1) for k in range(5)], axis=1)
    np.testing.assert_allclose(np.exp(ev.coarse_logits(logits, table)), sums, rtol=1e-12)
    np.testing.assert_array_equal(ev.coarse_logits(logits, table), ev.coarse_logits(logits, dict(enumerate(table.tolist()))))
    h, fine, by_sums = ev.evaluate_hierarchy(logits, labels, table), logits.argmax(axis=1), sums.argmax(axis=1)
    assert h.fine.top1 == np.mean(fine == labels) and h.coarse.top1 == np.mean(by_sums == table[labels])
    agree = by_sums == table[fine]
    assert h.agreement == agree.mean() and h.agree_accuracy == np.mean(by_sums[agree] == table[labels][agree])
    assert h.disagree_accuracy == np.mean(by_sums[~agree] == table[labels][~agree])
    assert h.within + h.across == np.sum(fine != labels) and h.across == np.sum(table[fine] != table[labels])
    assert json.dumps(h.metrics(), allow_nan=False) and f"{h.within} " in str(h)


def test_one_fine_class_a_coarse_class_changes_nothing():
    logits, labels = random_case(3)
    h = ev.evaluate_hierarchy(logits, labels, range(12))
    assert h.agreement == 1 and h.coarse.top1 == h.fine.top1 == h.by_fine_answer and h.within == 0
    assert np.isnan(h.disagree_accuracy) and h.metrics()["disagree_accuracy"] is None and "nan" not in str(h)
    far = ev.coarse_logits([[0., -5000., -5000., -np.inf]], [0, 1, 1, 2])
    np.testing.assert_allclose(far, [[0, -5000 + np.log(2), -np.inf]])


# Calibration

def ece_by_hand(shares, labels, bins=15):
    "The definition, photo by photo"
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    total = 0.0
    for k in range(bins):
        inside = (sure > k / bins) & (sure <= (k + 1) / bins)
        if inside.any(): total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return total


@pytest.mark.parametrize("stretch", [0.6, 1.0, 2.0])
def test_calibration_by_another_road(stretch):
    logits, labels = stretched(500, 1, stretch)
    shares = ev.softmax(logits)
    assert abs(ev.expected_calibration_error(shares, labels) - ece_by_hand(shares, labels)) < 1e-12
    assert abs(ev.nll(logits, labels) - sk.log_loss(labels, shares, labels=range(15))) < 1e-9
    bins = ev.reliability(shares, labels)
    assert sum(b.count for b in bins) == 500 and len(bins) == 15 and (bins[0].low, bins[-1].high) == (0, 1)
    assert abs(sum(b.count * abs(b.accuracy - b.confidence) for b in bins if b.count) / 500 - ece_by_hand(shares, labels)) < 1e-12
    assert all(b.low < b.confidence <= b.high and b.interval[0] <= b.accuracy <= b.interval[1] for b in bins if b.count)
    mass = [b.count for b in ev.reliability(shares, labels, bins=10, equal_mass=True)]
    assert sum(mass) == 500 and max(mass) - min(mass) <= 2


def test_equal_confidences_share_a_bin():
    shares, labels = np.tile([0.75, 0.25], (50, 1)), np.zeros(50, int)
    assert [b.count for b in ev.reliability(shares, labels, bins=4)] == [0, 0, 50, 0]
    assert [b.count for b in ev.reliability(shares, labels, bins=5, equal_mass=True) if b.count] == [50]
    certain = np.tile([1.0, 0.0], (50, 1))
    assert ev.expected_calibration_error(certain, labels) == 0 == ev.ece_floor(certain)
    assert [b.count for b in ev.reliability(certain, labels, equal_mass=True)][-1] == 50


def test_perfect_calibration_is_near_zero_and_at_its_floor():
    logits, labels = stretched(50_000, 2)
    assert ev.expected_calibration_error(ev.softmax(logits), labels) < 0.01
    errors = [ev.expected_calibration_error(ev.softmax(x), y) for x, y in (stretched(300, seed) for seed in range(60))]
    assert abs(np.mean(errors) - ev.ece_floor(ev.softmax(stretched(300, 0)[0]))) < 0.01


@pytest.mark.parametrize("stretch", [0.3, 1.0, 2.5])
def test_temperature_finds_the_truth_and_changes_no_answer(stretch):
    logits, labels = stretched(8000, 3, stretch)
    t = ev.fit_temperature(logits, labels)
    assert abs(t / stretch - 1) < 0.06
    np.testing.assert_array_equal(ev.scaled(logits, t).argmax(axis=1), logits.argmax(axis=1))
    def slope(x): return (ev.nll(ev.scaled(logits, x * 1.001), labels) - ev.nll(ev.scaled(logits, x / 1.001), labels))
    assert slope(t / 1.02) < 0 < slope(t * 1.02)
    assert abs(ev.fit_temperature(logits * 3 + 7, labels) / t - 3) < 1e-3


def test_a_temperature_that_cannot_be_known():
    for logits, labels in [(np.eye(5), np.arange(5)), (40 * np.eye(5), np.arange(5)), (3 * np.eye(3)[:1], [0]), (np.eye(5), np.roll(np.arange(5), 1)), (np.zeros((5, 5)), np.arange(5))]:
        with pytest.raises(ev.EvaluationError, match="No temperature between 0.05 and 20") as caught: ev.fit_temperature(logits, labels)
        assert "\n" not in str(caught.value) and ev.fit_temperature(logits, labels, otherwise=1.0) == 1


def test_cross_fitting_leaves_each_photo_out():
    logits, labels = stretched(60, 4, 2.0)
    each = ev.cross_fitted_temperature(logits, labels)
    groups = [np.flatnonzero(each == t) for t in np.unique(each)]
    assert sorted(map(len, groups)) == [12] * 5
    for fold in groups:
        rest = np.setdiff1d(np.arange(60), fold)
        assert ev.fit_temperature(logits[rest], labels[rest]) == each[fold[0]]
    np.testing.assert_array_equal(each, ev.cross_fitted_temperature(logits, labels))
    two_wrong, answers = np.eye(4)[np.arange(40) % 4] * 5, np.where(np.arange(40) < 2, 3, np.arange(40) % 4)
    for seed in range(5):  # both mistakes in one fold would leave the other four without any
        assert len(ev.cross_fitted_temperature(two_wrong, answers, seed=seed)) == 40


def test_calibration_object():
    logits, labels = stretched(400, 5, 2.0)
    own, given, none = (ev.evaluate_calibration(logits, labels, t) for t in (None, 2.0, 1.0))
    assert own.cross_fitted and not given.cross_fitted and own.temperature == ev.fit_temperature(logits, labels)
    assert own.nll_after < own.nll_before and own.ece_after < own.ece_before and given.ece_before == own.ece_before
    assert own.nll_after >= ev.nll(ev.scaled(logits, own.temperature), labels)
    assert (none.nll_before, none.ece_before) == (none.nll_after, none.ece_after) and repr(none.bins_before) == repr(none.bins_after)
    assert json.loads(json.dumps(own.metrics(), allow_nan=False)) == own.metrics() and "cross-fitted" in str(own)
    assert ev.evaluate_calibration(np.eye(3), range(3), None, otherwise=1.0).temperature == 1


# Unsure

def test_coverage_by_another_road():
    logits, labels = stretched(300, 6, 1.5)
    logits = logits[np.arange(300) % 120]  # makes ties
    curve, sure = ev.coverage_curve(logits, labels, 1.5), ev.softmax(logits / 1.5).max(axis=1)
    right = logits.argmax(axis=1) == labels
    assert (np.diff(curve.thresholds) > 0).all() and len(curve.thresholds) == len(np.unique(sure)) < 300
    for t in [0.0, 0.3, 0.9, *curve.thresholds[::20]]:
        there = curve.at(t)
        assert there.count == np.sum(sure >= t) and there.coverage == np.mean(sure >= t)
        assert np.isnan(there.accuracy) if not there.count else abs(there.accuracy - right[sure >= t].mean()) < 1e-12
    assert (curve.coverage[0], curve.accuracy[0]) == (1, ev.accuracy(logits, labels)) == curve.at(0)[2:4]
    shuffle = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(curve.hits, ev.coverage_curve(logits[shuffle], labels[shuffle], 1.5).hits)
    assert curve.at(1.1).count == 0 and np.isnan(curve.at(1.1).interval).all()


def test_careful_threshold_keeps_its_promise_where_the_lucky_one_does_not():
    unseen = ev.coverage_curve(*stretched(20_000, 1000))
    careful, lucky = [], []
    for seed in range(100):
        curve = ev.coverage_curve(*stretched(1000, seed))
        careful.append(unseen.at(ev.threshold_for(curve, 0.9)).accuracy < 0.9)
        lucky.append(unseen.at(curve.thresholds[np.flatnonzero(curve.accuracy >= 0.9)[0]]).accuracy < 0.9)
    assert np.mean(careful) <= 0.10 and np.mean(lucky) >= 0.3
    assert ev.threshold_for(curve, 0.9, confidence=0.99) >= ev.threshold_for(curve, 0.9) >= ev.threshold_for(curve, 0.8)


# Two models

@pytest.mark.parametrize("cells", [(70, 3, 0, 27), (10, 5, 5, 0), (200, 30, 12, 58), (0, 0, 7, 0), (9, 0, 0, 1), (1, 1, 7, 12)])
def test_mcnemar_by_hand(cells):
    a, b = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], cells, axis=0).T
    found = ev.mcnemar(a, b)
    assert (found.both, found.only_a, found.only_b, found.neither) == cells and found.n == sum(cells)
    few, split = min(cells[1:3]), cells[1] + cells[2]
    assert abs(found.p_value - min(1, 2 * sum(math.comb(split, k) for k in range(few + 1)) / 2**split)) < 1e-12
    assert abs(found.difference - (a.mean() - b.mean())) < 1e-12
    assert found.interval[0] - 1e-12 <= found.difference <= found.interval[1] + 1e-12
    other = ev.mcnemar(b, a)
    assert other.p_value == found.p_value and np.allclose(other.interval, [-end for end in found.interval[::-1]])
    np.testing.assert_allclose(found.interval, newcombe(*cells), atol=1e-12)


def newcombe(e, f, g, h):
    "Method 10 in the letters of Newcombe (1998, Stat. Med. 17, 2635-2650)"
    n = e + f + g + h
    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = ev.wilson_interval(e + f, n), ev.wilson_interval(e + g, n)
    numerator, product = e * h - f * g, (e + f) * (g + h) * (e + g) * (f + h)
    if numerator > n / 2: numerator -= n / 2
    elif numerator > 0: numerator = 0
    phi = numerator / product**0.5 if product else 0
    delta2 = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    epsilon2 = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    return p1 - p2 - delta2**0.5, p1 - p2 + epsilon2**0.5


def test_paired_interval_keeps_its_promise():
    shares, rng = (0.78, 0.07, 0.04, 0.11), np.random.default_rng(0)
    ends = np.array([ev.paired_interval(*map(int, cells)) for cells in rng.multinomial(300, shares, size=1000)])
    assert 0.93 <= np.mean((ends[:, 0] <= 0.03) & (0.03 <= ends[:, 1])) <= 0.98


def test_verdict_says_who():
    def pair(*cells): return np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], cells, axis=0).T
    assert ev.mcnemar(*pair(50, 30, 5, 15)).verdict("old", "new").startswith("old is better than new")
    assert ev.mcnemar(*pair(50, 5, 30, 15)).verdict("old", "new").startswith("new is better than old")
    assert "do not tell old and new apart" in ev.mcnemar(*pair(50, 5, 5, 40)).verdict("old", "new")
    assert 0.1 < ev.mcnemar(*pair(240, 9, 3, 48)).p_value < 0.2 and "do not tell" in ev.mcnemar(*pair(240, 9, 3, 48)).verdict()


# Other conditions, and bad input

def test_robustness_rows():
    first, second = (ev.evaluate_logits(*random_case(seed)) for seed in (1, 2))
    rows = ev.robustness_table({"as trained": first, "light": second})
    assert [row.name for row in rows] == ["as trained", "light"] and rows[0].change == 0
    assert rows[1].change == pytest.approx(100 * (second.top1 - first.top1)) and rows[1].interval == second.top1_interval
    assert "light" in ev.robustness_text(rows) and f"{rows[1].change:+.1f}" in ev.robustness_text(rows)


@pytest.mark.parametrize("call, words", [
    (lambda: ev.bootstrap_interval(np.mean), "arrays have [] rows"),
    (lambda: ev.bootstrap_interval(np.mean, []), "arrays have [0] rows"),
    (lambda: ev.bootstrap_interval(np.mean, 3.0), "arrays have [0] rows"),
    (lambda: ev.bootstrap_interval(np.mean, [1, 2], confidence=1), "confidence is 1"),
    (lambda: ev.bootstrap_interval(np.mean, [1, 2], resamples=5), "5 resamples"),
    (lambda: ev.bootstrap_interval(lambda x: float("inf"), [1, 2]), "not finite on 1000 of 1000"),
    (lambda: ev.share_interval([0.5]), "type float64"),
    (lambda: ev.share_interval([[True]]), "shape (1, 1)"),
    (lambda: ev.share_interval(["yes"]), "give one True or False"),
    (lambda: ev.coarse_logits([[1., 2.]], [0]), "1 fine classes are given for 2"),
    (lambda: ev.coarse_logits([[1., 2.]], {1: 0, 2: 0}), "each fine id, from 0 to 1"),
    (lambda: ev.coarse_logits([[1., 2.]], [0, -1]), "coarse ids hold -1"),
    (lambda: ev.coarse_logits([[1., 2.]], [0, 0.5]), "coarse ids are of type float64"),
    (lambda: ev.coarse_logits([[1., 2.]], ["a", "b"]), "coarse ids are of type"),
    (lambda: ev.coarse_logits([[1., 2.]], [0, 2]), "coarse class 1"),
    (lambda: ev.coarse_logits([[1., np.nan]], [0, 1]), "nan"),
    (lambda: ev.evaluate_hierarchy([[1., 2.]], [0], [0, 1], coarse_names=["one"]), "1 class names for 2"),
    (lambda: ev.reliability([[1., 2.]], [0]), "adds up to 3"),
    (lambda: ev.reliability([[1.5, -0.5]], [0]), "-0.5"),
    (lambda: ev.reliability([[0.5, 0.5]], [0], bins=0), "bins is 0"),
    (lambda: ev.scaled([[1., 2.]], -1), "temperature is -1"),
    (lambda: ev.scaled([[1., 2.]], float("nan")), "temperature is nan"),
    (lambda: ev.scaled([[1., 2.]], [1., 1.]), "one a photo"),
    (lambda: ev.nll([[1., -np.inf]], [1]), "Row 0 of the logits has -inf"),
    (lambda: ev.fit_temperature([[1., -np.inf]], [1]), "Row 0 of the logits has -inf"),
    (lambda: ev.cross_fitted_temperature(np.eye(3), [0, 1, 2], folds=4), "folds of 3 photos is 4"),
    (lambda: ev.cross_fitted_temperature(np.eye(3), [0, 1, 2], folds=3), "No temperature"),
    (lambda: ev.evaluate_calibration(np.eye(8), range(8), None), "No temperature"),
    (lambda: ev.threshold_for(ev.coverage_curve(np.eye(3), [0, 1, 2])), "No threshold is sure to give 95.0%"),
    (lambda: ev.threshold_for(ev.coverage_curve(np.eye(3), [0, 1, 2]), confidence=0.5), "confidence is 0.5"),
    (lambda: ev.mcnemar([True], [True, False]), "A was measured on 1 photos and B on 2"),
    (lambda: ev.mcnemar([], []), "hits of A have shape (0,)"),
    (lambda: ev.mcnemar([1, 2], [0, 1]), "hits of A"),
    (lambda: ev.robustness_table({}), "no conditions"),
])
def test_bad_input_of_the_new_parts_is_one_sentence(call, words):
    with pytest.raises(ev.EvaluationError, match=re.escape(words)) as caught: call()
    assert "\n" not in str(caught.value)


# Whatever is not finite, empty or of another shape

NAN, CURVE = float("nan"), ev.coverage_curve([[2., 0.], [0., 1.]], [0, 1])
BAD_LOGITS = {"nan": np.full((4, 3), NAN), "one nan": [[0., NAN, 1.]] + [[0., 1., 2.]] * 3, "inf": np.full((4, 3), np.inf), "all -inf": np.full((4, 3), -np.inf),
              "no photos": np.zeros((0, 3)), "no classes": np.zeros((4, 0)), "one dimension": np.zeros(4), "three dimensions": np.zeros((4, 3, 1)), "words": [["a"]] * 4}
TAKE_LOGITS = {
    "accuracy": lambda z: ev.accuracy(z, [0, 1, 2, 0]), "topk_accuracy": lambda z: ev.topk_accuracy(z, [0, 1, 2, 0], 1), "evaluate_logits": lambda z: ev.evaluate_logits(z, [0, 1, 2, 0]),
    "topk_hits": lambda z: ev.topk_hits(z, [0, 1, 2, 0]), "softmax": ev.softmax, "log_softmax": ev.log_softmax, "worst_mistakes": lambda z: ev.worst_mistakes(z, [0, 1, 2, 0]),
    "gallery": lambda z: ev.gallery(z, [0, 1, 2, 0], None, int), "coarse_logits": lambda z: ev.coarse_logits(z, [0, 0, 1]), "scaled": lambda z: ev.scaled(z, 2.0),
    "evaluate_hierarchy": lambda z: ev.evaluate_hierarchy(z, [0, 1, 2, 0], [0, 0, 1]), "reliability": lambda z: ev.reliability(z, [0, 1, 2, 0]), "nll": lambda z: ev.nll(z, [0, 1, 2, 0]),
    "expected_calibration_error": lambda z: ev.expected_calibration_error(z, [0, 1, 2, 0]), "ece_floor": ev.ece_floor, "fit_temperature": lambda z: ev.fit_temperature(z, [0, 1, 2, 0]),
    "cross_fitted_temperature": lambda z: ev.cross_fitted_temperature(z, [0, 1, 2, 0], 2), "evaluate_calibration": lambda z: ev.evaluate_calibration(z, [0, 1, 2, 0], None, otherwise=1.0),
    "coverage_curve": lambda z: ev.coverage_curve(z, [0, 1, 2, 0]), "disagreement_gallery": lambda z: disagreement_gallery(z, np.eye(3)[[0, 1, 2, 0]], [0, 1, 2, 0], None, int),
    "disagreement_gallery of B": lambda z: disagreement_gallery(np.eye(3)[[0, 1, 2, 0]], z, [0, 1, 2, 0], None, int)}


@pytest.mark.parametrize("bad", BAD_LOGITS)
@pytest.mark.parametrize("name", TAKE_LOGITS)
def test_a_model_that_says_nothing_gets_no_figure(name, bad):
    with pytest.raises(ev.EvaluationError) as caught: TAKE_LOGITS[name](BAD_LOGITS[bad])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


@pytest.mark.parametrize("labels", [[0, 1], [], [[0], [1], [2], [0]], [0., 1., 2., 0.], [0, 1, 2, 3], [0, 1, 2, -1], [NAN] * 4, ["a"] * 4, None], ids=repr)
def test_labels_that_are_none_get_no_figure(labels):
    for take in (ev.accuracy, ev.evaluate_logits, ev.topk_hits, ev.worst_mistakes, ev.nll, ev.fit_temperature, ev.evaluate_calibration, ev.coverage_curve,
                 lambda z, y: ev.gallery(z, y, None, int), lambda z, y: disagreement_gallery(z, z, y, None, int)):
        with pytest.raises(ev.EvaluationError) as caught: take(np.eye(3)[[0, 1, 2, 0]], labels)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call, words", [
    (lambda: ev.topk_hits(np.eye(3), [0, 1, 2], 1.5), "k is 1.5"),
    (lambda: ev.topk_hits(np.eye(3), [0, 1, 2], None), "k is None"),
    (lambda: ev.wilson_interval(NAN, 10), "more hits"),
    (lambda: ev.wilson_interval(1, float("inf")), "more hits"),
    (lambda: ev.wilson_interval([1, 2], [3, 4, 5]), "no counts of one shape"),
    (lambda: ev.wilson_interval("one", 2), "no counts of one shape"),
    (lambda: ev.confusion_rates([[1, -1], [0, 1]]), "counts -1 photos"),
    (lambda: ev.per_class_table(np.full((2, 2), NAN)), "type float64"),
    (lambda: ev.macro(ev.per_class_table(np.zeros((2, 2), int)), "recall"), "No class has photos"),
    (lambda: ev.macro((), "f1"), "No class has photos"),
    (lambda: ev.macro_intervals(np.zeros((2, 2), int)), "counts no photos"),
    (lambda: ev.effective_photos(np.zeros((2, 2), int)), "counts no photos"),
    (lambda: ev.top_confusions([[1, 1], [0, 1]], limit=-1), "limit is -1"),
    (lambda: ev.worst_mistakes([[0., 1.]], [0], limit=-1), "limit is -1"),
    (lambda: ev.worst_mistakes([[0., 1.]], [0], limit=1.5), "limit is 1.5"),
    (lambda: ev.gallery([[0., 1.]], [0], None, int, ["a", "b"]), "2 paths for 1 photos"),
    (lambda: ev.bootstrap_interval(np.mean, [1, 2], resamples=0), "resamples is 0"),
    (lambda: ev.bootstrap_interval(np.mean, [1, 2], resamples=99.5), "resamples is 99.5"),
    (lambda: ev.bootstrap_interval(lambda x: x, [1, 2]), "values of shape (2,)"),
    (lambda: ev.bin_edges([]), "confidences are none"),
    (lambda: ev.bin_edges([NAN]), "not all from 0 to 1"),
    (lambda: ev.bin_edges([0.5], 2.5), "bins is 2.5"),
    (lambda: ev.scaled([[1., 2.]], "warm"), "temperature is warm"),
    (lambda: ev.scaled([[1., 2.]], None), "temperature is None"),
    (lambda: ev.evaluate_calibration([[1., 2.]], [0], [1., 2.]), "temperature has shape (2,)"),
    (lambda: ev.evaluate_calibration([[1., 2.]], [0], NAN), "temperature is nan"),
    (lambda: ev.fit_temperature([[1., 2.]], [0], lowest=0), "search is from 0"),
    (lambda: ev.fit_temperature([[1., 2.]], [0], lowest=3, highest=2), "search is from 3"),
    (lambda: ev.cross_fitted_temperature([[1., 2.]], [0]), "one photo"),
    (lambda: CURVE.at(NAN), "threshold is nan"),
    (lambda: CURVE.at(None), "threshold is None"),
    (lambda: ev.threshold_for(CURVE, NAN), "accuracy wanted is nan"),
    (lambda: ev.threshold_for(CURVE, 95), "accuracy wanted is 95"),
    (lambda: ev.threshold_for(CURVE, confidence=NAN), "confidence is nan"),
    (lambda: ev.paired_interval(0, 0, 0, 0), "no photos"),
    (lambda: ev.paired_interval(1, -1, 0, 0), "number of photos is -1"),
    (lambda: ev.mcnemar([NAN], [1]), "hits of A"),
    (lambda: ev.mcnemar([True], [True], confidence=NAN), "confidence is nan"),
])
def test_numbers_that_are_none_are_refused(call, words):
    with pytest.raises(ev.EvaluationError, match=re.escape(words)) as caught: call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_photo_is_evaluated_as_far_as_it_goes(label, tmp_path):
    from grocery_nb.analysis.report import write_report
    logits = np.array([[3., 1., 0.]])
    e, h = ev.evaluate_logits(logits, [label]), ev.evaluate_hierarchy(logits, [label], [0, 0, 1])
    calibration, coverage = ev.evaluate_calibration(logits, [label], None, otherwise=1.0), ev.coverage_curve(logits, [label])
    assert e.n == 1 and e.top1 == (label == 0) and e.top1_interval == ev.wilson_interval(int(label == 0), 1)
    assert calibration.undetermined and calibration.temperature == 1 and "these photos determine none" in str(calibration)
    for one in (e, h, calibration): assert json.dumps(one.metrics(), allow_nan=False)
    page = write_report(tmp_path / "r.html", e, hierarchy=h, calibration=calibration, coverage=coverage, threshold=None).read_text(encoding="utf-8")
    assert "These photos determine no temperature" in page
    with pytest.raises(ev.EvaluationError, match="No temperature"): ev.evaluate_calibration(logits, [label], None)
