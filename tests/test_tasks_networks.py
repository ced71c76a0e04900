"""Network tasks against torch.nn, their initialisations, their data, and how they draw minibatches."""

import math

import pytest
import torch
from torch import nn

from lightning_hrnn.tasks.datasets import (
    Clusters,
    GaussianInputs,
    Manifold,
    Parity,
    Teacher,
    TeacherRegression,
    TokenInputs,
    TokenPairs,
    TokenTeacher,
)
from lightning_hrnn.tasks.draws import lookup, minibatch
from lightning_hrnn.tasks.networks import (
    ACTIVATIONS,
    Attention,
    BatchNormPerceptron,
    Embedding,
    NetworkTask,
    NormPerceptron,
    OneHotEmbedding,
    Perceptron,
    ResidualPerceptron,
)

MODULES = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight, bias):
    """An nn.Linear with the weights of one instance."""
    layer = nn.Linear(*weight.shape)
    layer.weight.data, layer.bias.data = weight.T, bias[0]
    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_perceptron_equals_torch_nn(activation):
    task = NetworkTask(Teacher(GaussianInputs(5, 40), classes=3), Perceptron((7, 4), activation), batch_size=8)
    params, data = task.init(2, generator())
    losses = task.loss(params, data)
    for i in range(2):
        own = [p[i] for p in params]
        model = nn.Sequential(
            linear(*own[:2]), MODULES[activation](), linear(*own[2:4]), MODULES[activation](), linear(*own[4:])
        )
        expected = nn.functional.cross_entropy(model(data["inputs"][i]), data["targets"][i])
        torch.testing.assert_close(losses[i], expected.detach())


@pytest.mark.parametrize(
    ("network", "norm", "activation"),
    [
        (NormPerceptron((6,), "gelu"), nn.LayerNorm(6), nn.GELU()),
        (BatchNormPerceptron((6,), "relu"), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()),
    ],
    ids=["layer norm", "batch norm"],
)
def test_norm_perceptrons_equal_torch_nn(network, norm, activation):
    params = network.init(generator(), 2, 5, 3)
    params = [p + 0.1 * torch.randn(p.shape, generator=generator(k)) for k, p in enumerate(params)]
    inputs = torch.randn(2, 9, 5, generator=generator())
    for i in range(2):
        weight, gain, shift, weight_out, bias_out = (p[i] for p in params)
        norm.weight.data, norm.bias.data = gain[0], shift[0]
        model = nn.Sequential(norm, activation, linear(weight_out, bias_out))
        torch.testing.assert_close(network.forward(params, inputs)[i], model(inputs[i] @ weight).detach())


def test_residual_perceptron_equals_torch_nn():
    network = ResidualPerceptron(width=6, inner=8, blocks=2, activation="relu")
    params = network.init(generator(), 2, 5, 3)
    assert len(params) == 2 + 2 * 6 + 2
    params = [p + 0.1 * torch.randn(p.shape, generator=generator(k)) for k, p in enumerate(params)]
    inputs = torch.randn(2, 9, 5, generator=generator())
    for i in range(2):
        own = [p[i] for p in params]
        stream = linear(*own[:2])(inputs[i])
        for k in (2, 8):
            normed = nn.functional.layer_norm(stream, (6,), own[k][0], own[k + 1][0])
            block = nn.Sequential(linear(*own[k + 2 : k + 4]), nn.ReLU(), linear(*own[k + 4 : k + 6]))
            stream = stream + block(normed)
        torch.testing.assert_close(network.forward(params, inputs)[i], linear(*own[-2:])(stream).detach())


def test_attention_equals_torch_nn():
    network = Attention(length=4, width=6, inner=8, blocks=2, activation="gelu")
    params = network.init(generator(), 2, 5, 3)
    assert len(params) == 2 + 2 * 12 + 4
    params = [p + 0.1 * torch.randn(p.shape, generator=generator(k)) for k, p in enumerate(params)]
    tokens = torch.randint(5, (2, 9, 4), generator=generator())
    for i in range(2):
        own = [p[i] for p in params]
        stream = own[0][tokens[i]] + own[1]
        for k in (2, 14):
            layer = nn.MultiheadAttention(6, 1, batch_first=True)
            layer.in_proj_weight.data, layer.in_proj_bias.data = own[k + 2].T, own[k + 3][0]
            layer.out_proj.weight.data, layer.out_proj.bias.data = own[k + 4].T, own[k + 5][0]
            normed = nn.functional.layer_norm(stream, (6,), own[k][0], own[k + 1][0])
            stream = stream + layer(normed, normed, normed)[0]
            normed = nn.functional.layer_norm(stream, (6,), own[k + 6][0], own[k + 7][0])
            block = nn.Sequential(linear(*own[k + 8 : k + 10]), nn.GELU(), linear(*own[k + 10 : k + 12]))
            stream = stream + block(normed)
        pooled = nn.functional.layer_norm(stream.mean(1), (6,), own[-4][0], own[-3][0])
        expected = linear(*own[-2:])(pooled).detach()
        torch.testing.assert_close(network.forward(params, tokens)[i], expected, rtol=1e-4, atol=1e-5)


def test_pairs_of_tokens_label_and_neither_alone_does():
    data = TokenPairs(TokenInputs(3, 4000, length=4), classes=2).draw(6, generator())
    for tokens, targets in zip(data["inputs"], data["targets"], strict=True):
        deciding = [
            (first, second)
            for first in range(4)
            for second in range(first + 1, 4)
            if _decide(3 * tokens[:, first] + tokens[:, second], targets)
        ]
        assert len(deciding) >= 1
    mixed = sum(
        not _decide(tokens[:, place], targets)
        for tokens, targets in zip(data["inputs"], data["targets"], strict=True)
        for place in range(4)
    )
    assert mixed > 18  # of 24: a random table seldom leaves all to one of its two tokens


def _decide(keys, targets):
    """Whether examples of equal keys have equal targets."""
    highest = torch.zeros(9, dtype=torch.long).scatter_reduce_(0, keys, targets, "amax")
    lowest = torch.ones(9, dtype=torch.long).scatter_reduce_(0, keys, targets, "amin")
    return bool((highest[keys] == lowest[keys]).all())


def test_embedding_and_its_one_hot_twin_agree():
    dataset = TokenTeacher(TokenInputs(12, 60, length=3, skew=1.0), classes=4)
    tasks = [NetworkTask(dataset, kind(5, Perceptron((6,))), batch_size=7) for kind in (Embedding, OneHotEmbedding)]
    params, data = tasks[0].init(3, generator())
    results = []
    for task in tasks:
        leaves = [p.clone().requires_grad_() for p in params]
        loss = task.loss(leaves, data, generator(1))
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)
    assert (results[0][1].abs().sum(-1) == 0).any()  # tokens that the minibatch lacks have no gradient


def test_initialisations():
    uniform = Perceptron((50,), start="uniform").init(generator(), 20, 25, 2)
    assert uniform[0].abs().max() <= 0.2
    assert uniform[0].std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.02)
    assert 0.19 < uniform[1].abs().max() <= 0.2
    for start, variance in (("gaussian", 1 / 25), ("he", 2 / 25)):
        weight, bias = Perceptron((50,), start=start).init(generator(), 20, 25, 2)[:2]
        assert weight.var().item() == pytest.approx(variance, rel=0.03)
        assert bias.abs().max() == 0


def test_minibatch_keeps_rows_together_and_inside_their_instance():
    first = torch.arange(3 * 10).view(3, 10, 1).expand(3, 10, 4)
    second = -torch.arange(3 * 10).view(3, 10)
    a, b = minibatch(first, second, size=200, generator=generator())
    assert a.shape == (3, 200, 4)
    assert torch.equal(a[..., 0], -b)
    for i in range(3):
        assert a[i].unique().tolist() == list(range(10 * i, 10 * i + 10))  # every row, no other instance's


def test_lookup_reads_each_instances_own_table():
    table = torch.arange(2 * 3 * 2.0).view(2, 3, 2)
    rows = torch.tensor([[[0, 2]], [[1, 1]]])
    assert lookup(table, rows).tolist() == [[[[0, 1], [4, 5]]], [[[8, 9], [8, 9]]]]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_gaussian_inputs_have_their_spectrum(decay):
    inputs = GaussianInputs(6, 50_000, decay).draw(1, generator())[0].double()
    spectrum = torch.linalg.eigvalsh(inputs.T.cov()).flip(0)
    expected = torch.arange(1, 7, dtype=torch.float64) ** -decay
    torch.testing.assert_close(spectrum, expected / expected.mean(), rtol=0.05, atol=0.0)
    shifted = GaussianInputs(4000, 100, offset=2.0).draw(1, generator())[0]
    assert shifted.mean(0).std().item() == pytest.approx(2.0, rel=0.05)


def test_token_frequencies_follow_the_skew():
    tokens = TokenInputs(8, 20_000, length=2, skew=1.0).draw(2, generator())
    assert tokens.shape == (2, 20_000, 2)
    counts = tokens[0].flatten().bincount(minlength=8).double()
    rank = torch.arange(1, 9, dtype=torch.float64)
    torch.testing.assert_close(counts / counts[0], 1 / rank, rtol=0.06, atol=0.0)


def test_labels_of_the_classifications():
    parity = Parity(TokenInputs(5, 5000, length=2), label_noise=0.5).draw(1, generator())
    agree = (parity["inputs"].sum(-1) % 2 == parity["targets"]).double().mean()
    assert agree.item() == pytest.approx(0.75, abs=0.03)  # half of the redrawn labels are right by chance

    teacher = Teacher(GaussianInputs(6, 4000), classes=4, hidden=8).draw(3, generator())
    shares = torch.stack([row.bincount(minlength=4) for row in teacher["targets"]]) / 4000
    assert shares.shape == (3, 4)
    assert shares.min() > 0.05  # standardised outputs: no class is empty

    far = Clusters(GaussianInputs(20, 500), classes=3, per_class=2, separation=100.0).draw(1, generator())
    distances = torch.cdist(far["inputs"][0], far["inputs"][0])
    same = far["targets"][0].unsqueeze(0) == far["targets"][0].unsqueeze(1)
    assert same[distances < 1].all()  # one cluster, one class
    assert (distances[same] > 1).any()  # a class of two clusters


def test_regression_targets():
    clean = TeacherRegression(GaussianInputs(4, 3000), targets=2, noise=0.0).draw(2, generator())["targets"]
    torch.testing.assert_close(clean.std(1), torch.ones(2, 2), rtol=1e-4, atol=0.0)
    noisy = TeacherRegression(GaussianInputs(4, 3000), targets=2, noise=0.5).draw(2, generator())["targets"]
    torch.testing.assert_close(noisy.var(1), torch.full((2, 2), 1.25), rtol=0.08, atol=0.0)
    manifold = Manifold(10, latent=1, noise=0.0).draw(1, generator())
    assert torch.equal(manifold["inputs"], manifold["targets"])
    curve = manifold["inputs"][0]
    nearest = (torch.cdist(curve, curve) + 10 * torch.eye(len(curve))).amin(1)
    assert nearest.median() < 0.05  # 1000 points on a line lie close, in ten dimensions


@pytest.mark.parametrize("seed", range(3))
def test_networks_can_be_trained(seed):
    """Gradient descent on the minibatch loss lowers the full loss well below chance."""
    dataset = Clusters(GaussianInputs(8, 300), classes=3, separation=2.0)
    task = NetworkTask(dataset, Perceptron((16,), "relu"), batch_size=32)
    params, data = task.init(4, generator(seed))
    source = generator(seed + 1)
    params = [p.requires_grad_() for p in params]
    for _ in range(300):
        grads = torch.autograd.grad(task.loss(params, data, source).sum(), params)
        params = [(p - 0.2 * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
    assert (task.loss(params, data) < 0.3 * math.log(3)).all()
