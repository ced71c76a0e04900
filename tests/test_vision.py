"""Data modules, nets by name and the classifier, on generated files and on scikit-learn's digits."""

import gzip
import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from helpers.images import StoredCIFAR, write_idx, write_idx_set
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hrnn.vision import (
    CIFAR10Data,
    CIFAR100Data,
    DataNotFoundError,
    DigitsData,
    FashionMNISTData,
    ImageClassifier,
    MNISTData,
    build_model,
)
from lightning_hrnn.vision import models as models_file
from lightning_hrnn.vision.baselines import rate_factor
from lightning_hrnn.vision.batches import ImageSet, TensorBatches
from lightning_hrnn.vision.data import stratified_split
from lightning_hrnn.vision.idx import read_idx
from lightning_hrnn.vision.transforms import Scale, ShiftAndFlip


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


# -- idx files


@pytest.mark.parametrize("name", ["a.gz", "a"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_idx_files_read_as_written(tmp_path, name, shape):
    written = torch.randint(0, 256, shape, dtype=torch.uint8)
    write_idx(tmp_path / name, written)
    assert torch.equal(read_idx(tmp_path / name), written)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "no idx file"),  # floats
        (b"\0\0\x08\x01\0\0\0\x05abc", "cut short"),
        (b"\0\0\x08\x02\0\0", "cut short"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, complaint):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'} .*{complaint}.*get the file again"):
        read_idx(tmp_path / "a")


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde")
    for name, content in {"cut.gz": whole[:-12], "text.gz": b"404 not found"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_idx(tmp_path / name)


@pytest.mark.parametrize("where", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_in_either_layout(tmp_path, where):
    train, test = write_idx_set(tmp_path / where, train=40, test=10)
    data = FashionMNISTData(str(tmp_path), validation=10)
    assert torch.equal(data.images("test").images, test.images)
    parts = [data.images(name) for name in ("train", "val")]
    assert sorted(map(len, parts)) == [10, 30]
    read = {image.numpy().tobytes() for part in parts for image in part.images}
    assert read == {image.numpy().tobytes() for image in train.images}


def test_fashion_mnist_reads_as_torchvision_does(tmp_path):
    from torchvision.datasets import FashionMNIST

    write_idx_set(tmp_path / "FashionMNIST" / "raw", train=40, test=10, suffix="")
    ours, _ = FashionMNISTData(str(tmp_path)).read()
    theirs = FashionMNIST(str(tmp_path), train=True)
    assert torch.equal(ours.images.squeeze(1), theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_debians_folder_is_the_last_resort_if_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, debian = write_idx_set(tmp_path / "debian", train=40, test=10)
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "debian")
    assert torch.equal(FashionMNISTData().read()[1].images, debian.images)
    _, own = write_idx_set(tmp_path / "data", train=40, test=20)
    assert torch.equal(FashionMNISTData().read()[1].images, own.images)


def test_a_named_folder_is_the_only_one_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "debian")
    for folder in ("debian", "data"):
        write_idx_set(tmp_path / folder, train=40, test=10)
    with pytest.raises(DataNotFoundError, match="neither 'gone' nor 'gone/FashionMNIST/raw' holds"):
        FashionMNISTData("gone").read()


@pytest.mark.parametrize("data", [FashionMNISTData, MNISTData, CIFAR10Data, CIFAR100Data])
def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch, data):
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "debian")
    with pytest.raises(DataNotFoundError, match=r"download=True.*data_dir") as caught:
        data(str(tmp_path / "nowhere")).setup()
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_incomplete_set_is_missing(tmp_path):
    write_idx_set(tmp_path, train=4, test=4)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataNotFoundError):
        MNISTData(str(tmp_path)).read()


def test_images_and_labels_must_belong_together(tmp_path):
    write_idx_set(tmp_path, train=4, test=4)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 images but 5 labels"):
        MNISTData(str(tmp_path)).read()


@pytest.mark.parametrize(("data", "name"), [(MNISTData, "MNIST"), (CIFAR10Data, "CIFAR10"), (CIFAR100Data, "CIFAR100")])
def test_download_asks_torchvision_and_says_if_it_cannot(tmp_path, monkeypatch, data, name):
    asked = []

    class Remote:
        base_folder = "x"

        def __init__(self, root, download):
            asked.append((str(root), download))
            raise RuntimeError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{name}", Remote)
    data(str(tmp_path)).prepare_data()
    assert asked == []
    with pytest.raises(
        DataNotFoundError, match=f"{name} could not be downloaded: no network. {name} not found"
    ) as caught:
        data(str(tmp_path), download=True).prepare_data()
    assert asked == [(str(tmp_path), True)]
    assert "--data.data_dir" in str(caught.value)


def test_what_is_there_is_not_downloaded(tmp_path, monkeypatch):
    write_idx_set(tmp_path, train=4, test=4)
    monkeypatch.setattr("torchvision.datasets.MNIST", None)
    MNISTData(str(tmp_path), download=True).prepare_data()


def test_cifar10_keeps_its_colours(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", StoredCIFAR)
    data = CIFAR10Data("x", validation=0, shift=None)
    image = data.images("test").images[3]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(StoredCIFAR("x", False).data[3]))
    assert data.train_transform() == data.eval_transform()
    assert CIFAR10Data("x").train_transform().shift == 4


# -- splits


def test_digits_are_split_without_overlap_and_by_class():
    from sklearn.datasets import load_digits

    data = DigitsData()
    parts = [data.images(name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1257, 180, 360]
    everything = sorted(image.numpy().tobytes() for part in parts for image in part.images)
    stored = torch.from_numpy(load_digits().images).to(torch.uint8)
    assert everything == sorted(image.numpy().tobytes() for image in stored)
    for part in parts:
        shares = part.labels.bincount(minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.01


def test_the_seed_moves_the_batches_and_not_the_split():
    one, other = DigitsData(seed=1), DigitsData(seed=2)
    for name in ("train", "val", "test"):
        assert torch.equal(one.images(name).images, other.images(name).images)
    first = [next(iter(data.train_dataloader()))[1] for data in (one, other)]
    assert not torch.equal(*first)


@pytest.mark.parametrize("held_out", [0, 7, 50, 99])
def test_a_split_covers_everything_once(held_out):
    labels = torch.randint(0, 3, (100,))
    kept, chosen = stratified_split(labels, held_out)
    assert len(chosen) == held_out
    assert torch.equal(torch.cat([kept, chosen]).sort().values, torch.arange(100))
    shares = labels[chosen].bincount(minlength=3) - labels.bincount(minlength=3) * held_out / 100
    assert shares.abs().max() <= 1


def test_more_validation_images_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="validation=1437, but there are only 1437"):
        DigitsData(validation=1437).setup()


# -- batches


def numbered(count):
    return ImageSet(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


def labels(batches):
    return [batch.tolist() for _, batch in batches]


def shuffled(count=20, batch_size=4, seed=0, **options):
    return TensorBatches(numbered(count), batch_size, lambda images: images.float(), seed, **options)


def test_each_epoch_is_another_order_of_everything():
    batches = shuffled()
    seen = []
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        seen.append(list(chain(*labels(batches))))
        assert sorted(seen[-1]) == list(range(20))
    assert len({tuple(order) for order in seen}) == 3


def test_the_order_depends_on_nothing_but_seed_and_epoch():
    torch.manual_seed(1)
    one = labels(shuffled(seed=5))
    torch.manual_seed(2)
    assert labels(shuffled(seed=5)) == one
    assert labels(shuffled(seed=6)) != one


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_the_ragged_batch_is_dropped_on_demand(drop_last, sizes):
    batches = shuffled(count=10, drop_last=drop_last)
    assert [len(batch) for batch in labels(batches)] == sizes
    assert len(batches) == len(sizes)


def test_the_only_batch_is_never_dropped():
    assert [len(batch) for batch in labels(shuffled(count=3, drop_last=True))] == [3]


def test_processes_see_together_what_one_sees_alone():
    alone = labels(shuffled(count=24, batch_size=6))
    ranks = [labels(shuffled(count=24, batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]


def test_processes_take_equally_many_steps():
    ranks = [labels(shuffled(count=9, batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]] == [2, 2, 1]
    seen = sorted(chain(*ranks[0], *ranks[1]))
    assert sorted(set(seen)) == list(range(9))
    assert len(seen) == 10  # one image twice


def test_an_empty_batch_size_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        shuffled(batch_size=0)


# -- transforms


def test_scaling_centres_each_channel():
    images = torch.randint(0, 256, (50, 2, 6, 6), dtype=torch.uint8)
    shares = images.double() / 255
    scale = Scale(tuple(shares.mean((0, 2, 3)).tolist()), tuple(shares.std((0, 2, 3)).tolist()))
    scaled = scale(images)
    assert scaled.dtype == torch.float32
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-5
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_images_are_resized_on_demand():
    data = DigitsData(image_size=20)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (180, 1, 20, 20)
    small, _ = next(iter(DigitsData().val_dataloader()))
    assert torch.allclose(images.mean(), small.mean(), atol=0.05)


def test_digits_are_centred():
    data = DigitsData(validation=0)
    inputs = data.eval_transform()(data.images("train").images)
    assert abs(inputs.mean()) < 0.01
    assert abs(inputs.std() - 1) < 0.01


def test_augmentation_moves_and_mirrors_each_image():
    images = torch.arange(1, 201, dtype=torch.uint8).repeat(200)[: 300 * 2 * 36].view(300, 2, 6, 6)
    moved = ShiftAndFlip(Scale((0.0, 0.0), (1.0, 1.0), maximum=1.0), shift=2)(images)
    padded = F.pad(images.float(), [2] * 4)
    shifts = [padded[:, :, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    ways = torch.stack(shifts + [way.flip(3) for way in shifts])  # [50, N, C, H, W]
    matches = (ways == moved).flatten(2).all(2)  # [50, N]
    assert matches.any(0).all()  # each image is one of its 50 variants
    assert matches.any(1).all()  # and each variant occurs


# -- nets


@pytest.mark.parametrize("name", ["conv", "conv_bn", "timm/resnet10t", "torchvision/squeezenet1_1", "mobilenet_v2"])
def test_nets_take_their_channels_and_give_their_classes(name):
    net = build_model(name, in_channels=2, num_classes=7).eval()
    assert net(torch.randn(2, 2, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("size", [4, 8, 28, 33])
def test_our_nets_take_images_of_any_size(size):
    for name in ("conv", "conv_bn"):
        assert build_model(name, in_channels=1, num_classes=3, width=4)(torch.randn(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize("divisor", [1, 4])
def test_a_narrow_inception_keeps_every_layer_and_the_scale_of_its_weights(divisor):
    torch.manual_seed(0)
    wide = build_model("torchvision/inception_v3", in_channels=2, num_classes=7, aux_logits=False)
    torch.manual_seed(0)
    narrow = build_model("inception_v3_narrow", in_channels=2, num_classes=7, divisor=divisor)
    assert [type(module) for module in narrow.modules()] == [type(module) for module in wide.modules()]
    for (name, param), theirs in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert param.shape[0] == (7 if name.startswith("fc.") else theirs.shape[0] // divisor)
        assert torch.equal(param, theirs[tuple(map(slice, param.shape))])
    assert narrow(torch.randn(2, 2, 75, 75)).shape == (2, 7)


def test_a_narrow_inception_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="1, 2, 4, 8 or 16"):
        build_model("inception_v3_narrow", in_channels=1, num_classes=3, divisor=3)


def test_an_unknown_net_brings_similar_names():
    with pytest.raises(ValueError, match=r"unknown model 'resnet188'; similar names: .*resnet18.*timm/NAME"):
        build_model("resnet188", in_channels=1, num_classes=3)
    with pytest.raises(ValueError, match="unknown model 'timm/conv'"):
        build_model("timm/conv", in_channels=1, num_classes=3)


# -- the classifier


@pytest.mark.parametrize(
    ("name", "torchs"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("rmsprop", torch.optim.RMSprop),
        ("sgd", torch.optim.SGD),
    ],
)
def test_baselines_run_at_torchs_defaults(name, torchs):
    module = ImageClassifier(optimizer=name)
    optimizer = module.configure_optimizers()
    extra = {"momentum": 0.9} if name == "sgd" else {}
    assert type(optimizer) is torchs
    assert optimizer.defaults == torchs(module.parameters(), **extra).defaults


def test_rates_and_decay_reach_the_optimizer():
    group = (
        ImageClassifier(optimizer="sgd", lr=0.5, weight_decay=0.25, momentum=0.1).configure_optimizers().param_groups[0]
    )
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.25, 0.1)


def test_a_given_decay_spares_biases_and_norms():
    module = ImageClassifier("conv_bn", optimizer="sgd", lr=0.1, weight_decay=0.25)
    decayed, spared = module.configure_optimizers().param_groups
    assert (decayed["name"], decayed["weight_decay"], spared["name"], spared["weight_decay"]) == (
        *("decayed", 0.25),
        *("spared", 0.0),
    )
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(module.parameters()))


def test_inceptions_rmsprop_divides_as_tensorflow_does():
    """Its mean square starts at one and epsilon lies inside the root: the first step of a gradient g."""
    options = {"alpha": 0.9, "eps": 1.0, "momentum": 0.0}
    module = ImageClassifier(optimizer="rmsprop_tf", lr=0.5, optimizer_options=options)
    optimizer = module.configure_optimizers()
    weight = module.net[0].weight
    before = weight.detach().clone()
    grad = torch.randn_like(weight)
    weight.grad = grad.clone()
    optimizer.step()
    expected = before - 0.5 * grad / (0.9 + 0.1 * grad**2 + 1.0).sqrt()
    torch.testing.assert_close(weight.detach(), expected)


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; valid are adamw, adam, rmsprop, rmsprop_tf, sgd"):
        ImageClassifier(optimizer="lion")


class Watched(ImageClassifier):
    """Notes the rate and the labels of each step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rates, self.seen, self.types = [], [], set()

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.seen.append(batch[1].tolist())
        return super().training_step(batch, batch_idx)

    def forward(self, images):
        logits = super().forward(images)
        self.types.add(logits.dtype)
        return logits


def test_the_cosine_ends_with_the_training():
    module = Watched(optimizer="sgd", lr=2.0, schedule="cosine", warmup_steps=3)
    data = DigitsData(batch_size=128)
    trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
    total = 2 * (1257 // 128)
    after = [1 + math.cos(math.pi * step / (total - 3)) for step in range(total - 3)]
    assert module.rates == pytest.approx([2 / 3, 4 / 3, 2.0, *after])


def test_steps_of_the_rate_are_counted_in_epochs():
    module = Watched(optimizer="sgd", lr=1.0, schedule="step", decay_epochs=2, decay_rate=0.5)
    trainer(max_epochs=5, limit_train_batches=4, accumulate_grad_batches=2, limit_val_batches=0).fit(
        module, datamodule=DigitsData(batch_size=8)
    )
    assert module.rates == [1.0] * 8 + [0.5] * 8 + [0.25] * 4


def test_a_cosine_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"needs an end: set --trainer\.max_epochs"):
        trainer(max_epochs=-1, limit_val_batches=0).fit(ImageClassifier(schedule="cosine"), datamodule=DigitsData())


def test_warm_up_goes_with_a_constant_rate_too():
    assert [rate_factor(step, warmup_steps=4, total_steps=None) for step in (0, 3, 4, 99)] == [0.25, 1.0, 1.0, 1.0]


@torch.no_grad()
def test_only_the_training_loss_is_smoothed():
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6)
    module = ImageClassifier(label_smoothing=0.2)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    module.log_dict = lambda *_, **__: None
    module.validation_step((images, targets), 0)
    log_shares = torch.log_softmax(module(images), dim=1)
    true, uniform = -log_shares[range(6), targets].mean(), -log_shares.mean()
    assert logged["val/loss"] == pytest.approx(float(true), rel=1e-5)
    assert float(module.training_step((images, targets), 0)) == pytest.approx(
        float(0.8 * true + 0.2 * uniform), rel=1e-5
    )


def test_auxiliary_logits_count_by_their_weight(monkeypatch):
    class TwoHeads(nn.Module):
        def __init__(self, in_channels, num_classes):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(64, num_classes) for _ in range(2))

        def forward(self, images):
            logits = tuple(head(images.flatten(1)) for head in self.heads)
            return (*logits, None) if self.training else logits[0]

    monkeypatch.setitem(models_file.MODELS, "two_heads", TwoHeads)
    module = ImageClassifier("two_heads", auxiliary_weight=0.3)
    module.log = lambda *_, **__: None
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6)
    main, auxiliary = (F.cross_entropy(head(images.flatten(1)), targets) for head in module.net.heads)
    assert torch.allclose(module.training_step((images, targets), 0), main + 0.3 * auxiliary)


@torch.no_grad()
def test_auxiliary_logits_of_a_net_that_always_gives_them_are_not_scored(monkeypatch):
    """As timm's Inception V3 with `aux_logits`, which gives them in evaluation too."""
    monkeypatch.setitem(models_file.MODELS, "always", lambda in_channels, num_classes: AlwaysTwo())
    module = ImageClassifier("always").eval()
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(module.predict_step((images, None), 0), torch.softmax(images.flatten(1)[:, :10], dim=1))


class AlwaysTwo(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10], images.flatten(1)[:, 10:20]


def test_channels_last_and_compiled_it_computes_the_same():
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    losses, grads = [], []
    for options in ({}, {"channels_last": True}, {"compile": "eager"}):
        torch.manual_seed(0)
        module = ImageClassifier("conv_bn", in_channels=3, **options)
        module.configure_model()
        module.log = lambda *_, **__: None
        loss = module.training_step((images, targets), 0)
        loss.backward()
        losses.append(loss.detach())
        grads.append(module.net[0].weight.grad)
        assert module.net[0].weight.is_contiguous(memory_format=module.memory_format)
        assert next(iter(module.state_dict())) == "net.0.weight"  # whatever compiles it
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)


def test_bf16_is_the_trainers():
    module = Watched(channels_last=True)
    trainer(max_steps=3, limit_val_batches=1, precision="bf16-mixed").fit(module, datamodule=DigitsData())
    assert module.types == {torch.bfloat16}
    assert module.net[0].weight.dtype == torch.float32


def test_more_classes_than_the_net_has_are_an_error():
    with pytest.raises(ValueError, match=r"The data have 10 classes, the net 9; set --model\.num_classes 10"):
        trainer(max_steps=1).fit(ImageClassifier(num_classes=9), datamodule=DigitsData())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a second run
@pytest.mark.parametrize("options", [{}, {"schedule": "cosine"}])  # which asks for the batches before the resume
def test_a_run_stopped_within_an_epoch_goes_on_with_the_unseen_batches(tmp_path, options):
    def run(place, checkpoint=None):
        module = Watched(**options)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "logger": False}
        runner = Trainer(
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=7,
            callbacks=[ModelCheckpoint(place, filename="a", every_n_train_steps=10)],
            **quiet,
        )
        runner.fit(module, datamodule=DigitsData(batch_size=8), ckpt_path=checkpoint)
        return module.seen

    whole = run(tmp_path / "whole")
    assert len(whole) == 14
    assert run(tmp_path / "rest", tmp_path / "whole" / "a.ckpt") == whole[10:]


def test_it_learns_digits_and_scores_the_whole_set():
    data = DigitsData(eval_batch_size=77)  # several ragged batches
    module = ImageClassifier(lr=0.003)
    runner = trainer(max_epochs=6)
    runner.fit(module, datamodule=data)
    (scores,) = runner.test(module, datamodule=data, verbose=False)
    test = data.images("test")
    with torch.no_grad():
        logits = module.eval()(data.eval_transform()(test.images))
    top5 = (logits.topk(5).indices == test.labels[:, None]).any(1).float().mean()
    assert scores["test/acc"] == pytest.approx(float((logits.argmax(1) == test.labels).float().mean()))
    assert scores["test/acc_top5"] == pytest.approx(float(top5))
    assert scores["test/loss"] == pytest.approx(float(F.cross_entropy(logits, test.labels)), rel=1e-4)
    assert scores["test/acc"] > 0.9
    shares = torch.cat(runner.predict(module, datamodule=data))
    assert torch.allclose(shares, torch.softmax(logits, dim=1), atol=1e-5)


def test_top5_is_left_out_where_it_says_nothing():
    assert list(ImageClassifier(num_classes=5).val_accuracy) == ["val/acc"]


def test_overfitting_repeats_the_same_batches():
    module = Watched()
    trainer(max_epochs=3, overfit_batches=1, limit_val_batches=0).fit(module, datamodule=DigitsData(batch_size=8))
    assert len(module.seen) == 3
    assert module.seen[0] == module.seen[1] == module.seen[2]


def test_a_checkpoint_restores_the_classifier(tmp_path):
    module = ImageClassifier("conv_bn", optimizer="sgd", model_options={"width": 4})
    runner = trainer(max_steps=2, limit_val_batches=0)
    runner.fit(module, datamodule=DigitsData())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.hparams == module.hparams
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(), strict=True)
    )
