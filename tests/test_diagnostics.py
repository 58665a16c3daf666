import pytest
import torch

from cmim.method.diagnostics import (
    agreement,
    coverage,
    gradient_norms,
    hidden_accuracy,
    mean_colour_error,
    separation,
    share_in_reach,
    token_purity,
)
from cmim.method.pseudo_labels import PseudoLabels
from cmim_kernels import class_centroids

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_coverage():
    labels = PseudoLabels(
        torch.tensor([[[0, 0, 0, 1, 1, 2, 2, 2]]]),
        torch.tensor([[[0.9, 0.8, 0.1, 0.8, 0.2, 0.9, 0.9, 0.9]]]),
        torch.tensor([[[True, True, True, True, True, True, False, False]]]),
    )
    assert coverage(labels, 0.8, None) == {"coverage": torch.tensor(4 / 6)}
    figures = coverage(labels, 0.8, 0)
    assert set(figures) == {"coverage", "coverage_foreground"}
    assert figures["coverage_foreground"] == torch.tensor(2 / 3)
    nothing = labels._replace(valid=torch.zeros_like(labels.valid))
    assert coverage(nothing, 0.8, 0) == {"coverage": torch.tensor(0.0), "coverage_foreground": torch.tensor(0.0)}


def make_target(normalize, distance, balance):
    g = torch.Generator().manual_seed(0)
    return dict(
        image=torch.randint(0, 256, (2, 3, 6, 8), generator=g, dtype=torch.uint8),
        masked=torch.rand(2, 12, generator=g) < 0.5, labels=torch.randint(-1, 3, (2, 12), generator=g, dtype=torch.int32),
        num_classes=3, patch_size=2, distance=distance, normalize=normalize, balance=balance, mean=MEAN, std=STD,
    )  # fmt: skip


@pytest.mark.parametrize("balance", ["token", "class"])
@pytest.mark.parametrize(("normalize", "distance"), [(False, "l1"), (False, "mse"), (True, "mse")])
def test_mean_colour_error(normalize, distance, balance):
    target = make_target(normalize, distance, balance)
    images = (target["image"] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3).permute(0, 2, 1, 3, 4)  # (B, N, 3, p, p)
    errors = [[], [], []]
    for b in range(2):
        for n in range(12):
            k = int(target["labels"][b, n])
            if k < 0 or not target["masked"][b, n]:
                continue
            others = [
                patches[b, m].mean((1, 2)) for m in range(12) if target["labels"][b, m] == k and not target["masked"][b, m]
            ]
            guess = torch.stack(others).mean(0) if others else torch.zeros(3)
            patch = patches[b, n]
            if normalize:
                guess, patch = torch.zeros(3), (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            difference = patch - guess[:, None, None]
            errors[k].append((difference.abs() if distance == "l1" else difference**2).mean())
    assert all(errors)
    if balance == "token":
        errors = [[error for of_class in errors for error in of_class]]
    expected = torch.stack([torch.stack(e).mean() for e in errors]).mean()
    torch.testing.assert_close(mean_colour_error(images, target), expected)


def test_separation():
    g = torch.Generator().manual_seed(1)
    tokens, labels = torch.randn(3, 15, 5, generator=g), torch.randint(-1, 4, (3, 15), generator=g)
    masked = torch.rand(3, 15, generator=g) < 0.4
    labels[2] = 1  # one class only
    between, within = [], []
    for b in range(3):
        visible, hidden = (
            {k: tokens[b, own & (labels[b] == k)].mean(0) for k in range(4) if (own & (labels[b] == k)).any()}
            for own in (~masked[b], masked[b])
        )
        between += [(visible[j] - visible[k]).norm() for j in visible for k in visible if j != k]
        within += [(visible[k] - hidden[k]).norm() for k in visible if k in hidden]
    expected = torch.stack(between).mean() / torch.stack(within).mean()
    centroids = class_centroids(tokens, labels, masked, 4)
    torch.testing.assert_close(separation(centroids), expected)
    mean = centroids.mean.clone()
    mean[:, :, 1] = mean[:, :, 0] + 1e-3
    assert separation(centroids._replace(mean=mean)) > 100  # hidden beside visible
    assert separation(class_centroids(tokens, torch.full_like(labels, -1), masked, 4)) == 0


def test_gradient_norms_of_known_gradients():
    a, b = torch.ones(2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    terms = {"both": (3 * a).sum() + (4 * b).sum(), "one": (5 * a[0]), "none": torch.ones(1, requires_grad=True).sum()}
    norms = gradient_norms(terms, [a, b])
    assert {name: round(norm.item(), 5) for name, norm in norms.items()} == {
        "gradient_both": round(50**0.5, 5),
        "gradient_one": 5.0,
        "gradient_none": 0.0,
    }
    sum(terms.values()).backward()  # the graph is still there


def test_agreement_is_the_cosine_of_the_gradients():
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    frozen = torch.ones(2)
    terms = {"strong": 5 * a[0] + b.sum(), "sup": a[0] * 2, "apart": b[0] * 1, "against": -a[0], "none": torch.zeros(())}
    found = agreement(terms, [a, b, frozen])
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        "agreement_strong": round(5 / 28**0.5, 4), "agreement_apart": 0, "agreement_against": -1,
    }  # fmt: skip


def test_accuracy_at_hidden_pixels():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 0], logits[0, 1, :, 1] = 4.5, 9  # class 1 in the right half
    classes = torch.tensor([[[0, 0, 1, 1]] * 2 + [[1, 1, 255, 0]] * 2])
    hidden = torch.ones(1, 4, 4, dtype=torch.bool)
    hidden[0, 0] = False
    # Hidden and known: 4 of the second row, all right, and 3 in each of the last two, all wrong.
    assert hidden_accuracy(logits, classes, hidden, align_corners=False) == 0.4
    assert hidden_accuracy(logits, classes, hidden & False, align_corners=False) == 0


def test_purity_of_tokens_and_the_share_in_reach():
    classes = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [255, 255, 2, 1], [255, 255, 0, 255]]])
    token_classes = torch.tensor([[[0, 1], [-1, 2]]])
    # 3 of 4 pixels have the class 0 of their token, 4 of 4 the class 1, 1 of 4 the class 2; the fourth token has none.
    assert token_purity(classes, token_classes, 2) == 8 / 12
    assert token_purity(classes, token_classes * 0 - 1, 2) == 0
    masked = torch.tensor([[[True, True], [True, False]]])
    reached = torch.tensor([[[True, False], [True, True]]])
    assert share_in_reach(reached, token_classes, masked) == 1 / 2
    assert share_in_reach(reached, token_classes, masked & False) == 0
