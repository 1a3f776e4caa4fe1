"""The probe and its file, and the closed form and the gradient behind it, against longhand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpclip import files
from lpclip.method.gaussian import TextAnchors, gaussian_probe, make_whitening, row_moments
from lpclip.method.linear import Linear
from lpclip.method.probe import Probe, load_probe, zero_shot_probe
from lpclip.method.solvers import weighted_cross_entropy_gradient


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(
    num_rows: int, means: torch.Tensor, *, covariance_root: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(len(means), (num_rows,), generator=torch.Generator().manual_seed(1))
    return means[labels] + random(num_rows, means.shape[1], seed=2) @ covariance_root, labels


def fit(features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = (targets.T @ features).double()
    whitening = make_whitening(row_moments(features))
    fitted = gaussian_probe(sums, targets.double().sum(dim=0), whitening=whitening)
    return fitted.weight, fitted.bias


def longhand(features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear discriminant analysis in the whitened space, the within-class covariance inverted as it stands."""
    x, y = features.double(), targets.double()
    num_rows, dim = x.shape
    total = torch.cov(x.T, correction=0)
    shrinkage = max(0.1, 2 * dim / (2 * dim + num_rows))
    shrunk = (1 - shrinkage) * total + shrinkage * total.trace() / dim * torch.eye(dim)
    values, vectors = torch.linalg.eigh(shrunk)
    root = vectors / values.sqrt()
    z = (x - x.mean(dim=0)) @ root
    means = (y.T @ z) / y.sum(dim=0)[:, None]
    within = (z.T @ z - (means * y.sum(dim=0)[:, None]).T @ means) / num_rows
    level = max(0.3, shrinkage)
    inverse = torch.linalg.inv((1 - level) * within + level * within.trace() / dim * torch.eye(dim))
    weight = means @ inverse @ root.T
    bias = -((means @ inverse) * means).sum(dim=1) / 2 - weight @ x.mean(dim=0)
    return weight.float(), bias.float()


@pytest.mark.parametrize(("num_rows", "num_classes", "dim"), [(500, 3, 6), (40, 7, 5), (20, 4, 30)])
def test_the_closed_form_is_a_linear_discriminant_in_the_white_space(
    num_rows: int, num_classes: int, dim: int
):
    features = random(num_rows, dim) + torch.linspace(-1, 1, dim)
    targets = torch.softmax(2 * random(num_rows, num_classes, seed=1), dim=1)
    weight, bias = fit(features, targets)
    expected, expected_bias = longhand(features, targets)
    torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, expected_bias, atol=1e-4, rtol=1e-4)


def test_whitened_features_have_mean_zero_and_the_variance_that_shrinkage_leaves():
    features = 3 + random(2000, 4) @ torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1]))
    whitening = make_whitening(row_moments(features))
    assert whitening.shrinkage == 0.1
    z = (features.double() - whitening.mean) @ whitening.whitener
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(4).double(), atol=1e-3, rtol=0)
    # The directions of large variance are white; those that the shrinkage lifted have less.
    variances = torch.linalg.eigvalsh(torch.cov(z.T, correction=0))
    total = torch.cov(features.double().T, correction=0)
    values = torch.linalg.eigvalsh(total)
    expected = values / (0.9 * values + 0.1 * values.mean())
    torch.testing.assert_close(variances, expected.sort().values, atol=1e-3, rtol=0)
    torch.testing.assert_close(z, whitening.whitened(features.double() - whitening.mean))


def test_fewer_rows_shrink_more():
    many, few = (make_whitening(row_moments(random(n, 8))).shrinkage for n in (1000, 4))
    assert (many, few) == (0.1, 0.8)


def test_row_moments_add_up_over_shards():
    features = random(50, 3).half()
    cut = sum(row_moments(part) for part in features.split([0, 7, 43]))
    torch.testing.assert_close(cut, row_moments(features), atol=1e-4, rtol=1e-5)
    assert cut[0, 0] == 50


def test_true_labels_of_planted_gaussians_give_nearly_bayes_accuracy():
    means, root = random(4, 6), 0.7 * torch.eye(6) + 0.3 * random(6, 6, seed=5)
    features, labels = blobs(4000, means, covariance_root=root)
    weight, bias = fit(features, F.one_hot(labels, 4).float())
    inverse = torch.linalg.inv(root.T @ root)
    best = features @ (means @ inverse).T - ((means @ inverse) * means).sum(dim=1) / 2
    bayes = (best.argmax(dim=1) == labels).double().mean()
    found = ((features @ weight.T + bias).argmax(dim=1) == labels).double().mean()
    assert 0.6 < bayes < 0.99
    assert found > bayes - 0.03


def test_turned_features_turn_the_probe():
    features, targets = random(300, 6), torch.softmax(random(300, 3, seed=1), dim=1)
    turn = torch.linalg.qr(random(6, 6, seed=3)).Q
    weight, bias = fit(features, targets)
    turned, turned_bias = fit(features @ turn, targets)
    torch.testing.assert_close(turned, weight @ turn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned_bias, bias, atol=1e-4, rtol=1e-4)


def test_moved_and_stretched_features_keep_their_labels():
    features, targets = random(300, 6), torch.softmax(random(300, 3, seed=1), dim=1)
    weight, bias = fit(features, targets)
    moved, moved_bias = fit(5 * features + 2, targets)
    torch.testing.assert_close(
        (5 * features + 2) @ moved.T + moved_bias, features @ weight.T + bias, atol=1e-3, rtol=1e-3
    )


def test_the_order_of_classes_and_of_rows_does_not_matter():
    features, targets = random(300, 6), torch.softmax(random(300, 4, seed=1), dim=1)
    weight, bias = fit(features, targets)
    rows, order = random(300, seed=2).argsort(), torch.tensor([3, 1, 0, 2])
    other, other_bias = fit(features[rows], targets[rows][:, order])
    torch.testing.assert_close(other, weight[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_bias, bias[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
def test_rows_left_out_far_from_the_middle_never_break_the_inverse(share: float):
    means = 4 * torch.eye(3, 6)
    features, labels = blobs(600, means, covariance_root=torch.eye(6))
    keep = torch.arange(600) < share * 600
    features[keep] = means[labels[keep]] * 3
    weight, bias = fit(features, F.one_hot(labels, 3) * keep[:, None].float())
    accuracy = ((features @ weight.T + bias).argmax(dim=1) == labels).double().mean()
    assert accuracy > 0.9


CASES = {
    "one row of a class": (random(30, 5), [0] * 29 + [1], 2),
    "a class nobody is assigned to": (random(30, 5), [0, 1] * 15, 3),
    "identical rows": (torch.full((30, 5), 5**-0.5), [0, 1] * 15, 2),
    "a single row": (random(1, 5), [0], 2),
    "more classes than rows": (random(4, 5), [0, 1, 2, 3], 9),
    "more classes than dimensions": (random(30, 2), list(range(10)) * 3, 10),
    "more dimensions than rows": (random(4, 64), [0, 1, 0, 1], 2),
    "a dimension that is always zero": (random(30, 5) * torch.tensor([1.0, 1, 1, 1, 0]), [0, 1] * 15, 2),
    "classes apart without any spread": (torch.eye(2, 5).repeat(15, 1), [0, 1] * 15, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_extreme_rows_give_finite_weights(name: str):
    features, labels, num_classes = CASES[name]
    weight, bias = fit(features, F.one_hot(torch.tensor(labels), num_classes).float())
    assert weight.isfinite().all()
    assert bias.isfinite().all()


def test_an_empty_class_lies_at_the_mean_of_all_or_where_its_text_says():
    features, labels = blobs(300, 6 * torch.eye(3, 6), covariance_root=torch.eye(6))
    targets = F.one_hot(labels, 4).float()
    weight, bias = fit(features, targets)
    assert weight[3].abs().max() == 0
    assert bias[3] == 0
    sums, counts = (targets.T @ features).double(), targets.sum(dim=0).double()
    whitening = make_whitening(row_moments(features))
    # The texts point to the true means, and the fourth to where no image is.
    anchors = TextAnchors(head=torch.eye(4, 6), rows=10.0)
    found = gaussian_probe(sums, counts, whitening=whitening, anchors=anchors)
    assert (found.logits(features).argmax(dim=1) == labels).float().mean() > 0.98
    assert found.predict(torch.eye(4, 6) * 6 + features.mean(dim=0)).tolist() == [0, 1, 2, 3]
    assert found.evidence == pytest.approx(float((counts[:3] ** 2 / (counts[:3] + 10)).sum() / 300))


def test_a_text_counts_for_as_many_images_as_it_is_given():
    features, labels = blobs(60, 3 * torch.eye(3, 6), covariance_root=torch.eye(6))
    targets = F.one_hot(labels, 3).float()
    sums, counts = (targets.T @ features).double(), targets.sum(dim=0).double()
    whitening, head = make_whitening(row_moments(features)), torch.eye(3, 6)
    plain = gaussian_probe(sums, counts, whitening=whitening)
    little, much = (
        gaussian_probe(sums, counts, whitening=whitening, anchors=TextAnchors(head=head, rows=rows))
        for rows in (1e-6, 1e6)
    )
    torch.testing.assert_close(little.weight, plain.weight, atol=1e-4, rtol=1e-4)
    assert (plain.evidence, little.evidence) == (1.0, pytest.approx(1.0))
    assert much.evidence < 1e-4
    # The texts alone point the right way.
    assert (much.predict(features) == labels.numpy()).mean() > 0.9


def test_soft_targets_of_the_same_temperature_have_no_gradient():
    features, head = F.normalize(random(200, 8), dim=1), F.normalize(random(5, 8, seed=1), dim=1)
    teacher = zero_shot_probe(head, temperature=0.01)
    gradient = weighted_cross_entropy_gradient(
        features,
        teacher.probabilities(features),
        random(200, seed=2).abs(),
        weight=teacher.weight,
        bias=teacher.bias,
    )
    assert gradient.abs().max() < 1e-4
    colder = zero_shot_probe(head, temperature=0.005).probabilities(features)
    gradient = weighted_cross_entropy_gradient(
        features, colder, torch.ones(200), weight=teacher.weight, bias=teacher.bias
    )
    assert gradient.abs().max() > 0.1


def test_the_gradient_equals_that_of_automatic_differentiation():
    features, targets, weights = (
        random(40, 6),
        torch.softmax(random(40, 3, seed=1), dim=1),
        random(40, seed=4).abs(),
    )
    weight, bias = random(3, 6, seed=2).requires_grad_(), random(3, seed=3).requires_grad_()
    loss = (F.cross_entropy(features @ weight.T + bias, targets, reduction="none") * weights).sum()
    expected = torch.cat([part.reshape(3, -1) for part in torch.autograd.grad(loss, (weight, bias))], dim=1)
    found = weighted_cross_entropy_gradient(
        features, targets, weights, weight=weight.detach(), bias=bias.detach()
    )
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=1e-4)


def test_zero_shot_is_the_argmax_of_features_times_head():
    features, head = F.normalize(random(50, 8), dim=1), F.normalize(random(5, 8, seed=1), dim=1)
    probe = zero_shot_probe(head, temperature=0.04, class_names=tuple("abcde"))
    assert probe.probabilities(features).argmax(1).tolist() == (features @ head.T).argmax(1).tolist()
    torch.testing.assert_close(probe.probabilities(features), torch.softmax(features @ head.T / 0.04, dim=1))
    assert probe.class_names == tuple("abcde")


def make_probe() -> Probe:
    return Probe(
        weight=random(3, 5),
        bias=random(3, seed=1),
        temperature=0.37,
        class_names=("cat", "dog", "Ünïcode 雪"),
        encoder={"model": "lite", "mean": [0.1, 0.2]},
        summary={"rounds": 4},
    )


def test_another_temperature_changes_confidence_and_no_label():
    probe, features = make_probe(), random(100, 5)
    warm, cold = (replace(probe, temperature=t).probabilities(features) for t in (10.0, 0.1))
    assert warm.argmax(dim=1).tolist() == cold.argmax(dim=1).tolist()
    assert (warm.amax(dim=1) <= cold.amax(dim=1)).all()
    assert probe.temperature == 0.37


def test_features_of_any_dtype_and_number_have_logits():
    probe, features = make_probe(), random(20_000, 5)
    whole = probe.logits(features)
    torch.testing.assert_close(probe.logits(features.numpy().astype(np.float64)), whole, atol=1e-5, rtol=1e-5)
    assert probe.logits(features.half()).dtype == torch.float32
    assert probe.logits(np.zeros((0, 5), np.float16)).shape == (0, 3)
    assert probe.probabilities(np.zeros((0, 5), np.float16)).shape == (0, 3)
    assert probe.predict(np.zeros((0, 5), np.float16)).shape == (0,)


def test_predictions_are_arrays_of_the_largest_logits_and_of_the_probabilities():
    probe, features = make_probe(), random(300, 5)
    expected = (features @ probe.weight.T + probe.bias).argmax(dim=1).numpy()
    predicted, probabilities = probe.predict(features.numpy()), probe.predict_proba(features.numpy())
    assert isinstance(predicted, np.ndarray)
    assert predicted.dtype == np.int64
    assert (predicted == expected).all()
    assert (Linear(weight=probe.weight, bias=probe.bias).predict(features) == expected).all()
    assert isinstance(probabilities, np.ndarray)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (300, 3))
    np.testing.assert_array_equal(probabilities, probe.probabilities(features).numpy())


def test_a_saved_probe_comes_back_bit_for_bit(tmp_path: Path):
    probe = make_probe()
    turned = replace(probe, weight=random(5, 3).T)
    for number, saved in enumerate([probe, turned]):
        saved.save(str(tmp_path / str(number)))
        found = Probe.load(str(tmp_path / str(number)))
        assert torch.equal(found.weight, saved.weight)
        assert torch.equal(found.bias, saved.bias)
        assert (found.temperature, found.class_names) == (saved.temperature, saved.class_names)
        assert (found.encoder, found.summary) == (saved.encoder, saved.summary)
        names = sorted(path.name for path in (tmp_path / str(number)).iterdir())
        assert names == ["probe.json", "probe.safetensors"]


def cut_tensors(folder: Path) -> None:
    data = (folder / "probe.safetensors").read_bytes()
    (folder / "probe.safetensors").write_bytes(data[:-8])


def edit(folder: Path, **changes: object) -> None:
    text = files.read_json(str(folder / "probe.json")) | changes
    files.write_json(str(folder / "probe.json"), {k: v for k, v in text.items() if v is not None})


DAMAGE = {
    "no json": lambda folder: (folder / "probe.json").unlink(),
    "no tensors": lambda folder: (folder / "probe.safetensors").unlink(),
    "tensors cut short": cut_tensors,
    "tensors empty": lambda folder: (folder / "probe.safetensors").write_bytes(b""),
    "json cut short": lambda folder: (folder / "probe.json").write_text('{"format": 1,'),
    "json not text": lambda folder: (folder / "probe.json").write_bytes(b"\xff\xfe\x00"),
    "json of another kind": lambda folder: (folder / "probe.json").write_text("[1, 2]"),
    "another format": lambda folder: edit(folder, format=99),
    "a class too many": lambda folder: edit(folder, class_names=["a", "b", "c", "d"]),
    "no class names": lambda folder: edit(folder, class_names=None),
    "no temperature": lambda folder: edit(folder, temperature=None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_probe_is_refused_by_its_name(name: str, tmp_path: Path):
    folder = tmp_path / "probe"
    make_probe().save(str(folder))
    DAMAGE[name](folder)
    with pytest.raises(ValueError, match=str(folder)):
        load_probe(str(folder))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    replace(make_probe(), bias=torch.zeros(4)).save(str(tmp_path))
    with pytest.raises(ValueError, match="do not fit"):
        load_probe(str(tmp_path))


def test_a_folder_without_a_probe_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no probe"):
        load_probe(str(tmp_path / "nowhere"))
