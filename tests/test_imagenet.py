"""Folders of images in ImageNet's layouts: found, augmented, dealt out, resumed; nets that are sharded."""

from itertools import chain

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hrnn.vision import DataNotFoundError, ImageClassifier, ImageNetData, build_model, write_image_folder
from lightning_hrnn.vision.loading import EpochShare
from lightning_hrnn.vision.sharding import blocks

# Lightning's advice on workers: tests load their few images in the main process.
pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, ten training and four validation images of each."""
    return write_image_folder(tmp_path_factory.mktemp("images") / "generated", classes=3, train=10, val=4, size=40)


def images(folder, **options):
    data = ImageNetData(str(folder), **{"image_size": 16, "workers": 0, "batch_size": 4, **options})
    data.prepare_data()
    data.setup()
    return data


def labels(loader):
    return list(chain.from_iterable(batch.tolist() for _, batch in loader))


# -- generated folders


def test_generated_images_differ_by_class_more_than_within(folder):
    data = images(folder)
    inputs, classes = next(iter(data.val_dataloader()))
    means = torch.stack([inputs[classes == k].mean((0, 2, 3)) for k in range(3)])  # [class, channel]
    within = torch.stack([inputs[classes == k].mean((2, 3)).std(0) for k in range(3)]).mean()
    assert torch.pdist(means).min() > within
    assert len(list(folder.rglob("*.JPEG"))) == 3 * 14


def test_generated_images_are_not_written_over(folder):
    with pytest.raises(FileExistsError, match=r"train is there already; name another folder"):
        write_image_folder(folder)


# -- layouts


def test_a_folder_by_class_is_served(folder):
    data = images(folder, eval_batch_size=5)
    assert data.classes == ["class0000", "class0001", "class0002"]
    assert data.num_classes == 3
    inputs, _ = next(iter(data.train_dataloader()))
    assert (inputs.shape, inputs.dtype) == ((4, 3, 16, 16), torch.float32)
    assert len(labels(data.train_dataloader())) == 28  # of 30, the ragged batch left out
    assert sorted(labels(data.val_dataloader())) == [0] * 4 + [1] * 4 + [2] * 4
    assert labels(data.test_dataloader()) == labels(data.predict_dataloader()) == labels(data.val_dataloader())


def test_a_flat_validation_folder_takes_its_classes_from_the_devkit(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").mkdir()
    names = ["class0002", "class0000", "class0001"]
    for number, name in enumerate(names):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").symlink_to(folder / "val" / name / "00000.JPEG")
    with pytest.raises(DataNotFoundError, match=r"no folder for each class, and ILSVRC2012_devkit_t12\.tar\.gz"):
        images(tmp_path)
    torch.save(({name: (name,) for name in names}, names), tmp_path / "meta.bin")  # as torchvision reads the devkit
    inputs, classes = next(iter(images(tmp_path).val_dataloader()))
    assert classes.tolist() == [2, 0, 1]
    by_class, order = next(iter(images(folder).val_dataloader()))
    for image, label in zip(inputs, classes, strict=True):
        assert torch.equal(image, by_class[order == label][0])
    torch.save(({name: (name,) for name in names}, names[:2]), tmp_path / "meta.bin")
    with pytest.raises(ValueError, match="holds 3 images, the devkit names the classes of 2"):
        images(tmp_path)
    torch.save(({}, [*names[:2], "n0"]), tmp_path / "meta.bin")
    with pytest.raises(ValueError, match="images of the class 'n0', which the training images lack"):
        images(tmp_path)


def test_archives_are_unpacked_by_torchvision_once(tmp_path, monkeypatch):
    from torchvision.datasets import imagenet

    asked = []
    monkeypatch.setattr(imagenet, "ImageNet", lambda root, split: asked.append(split))
    monkeypatch.setattr(imagenet, "parse_devkit_archive", lambda root: asked.append("devkit"))
    for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz"):
        (tmp_path / f"ILSVRC2012_{name}").touch()
    data = ImageNetData(str(tmp_path))
    data.prepare_data()
    assert asked == ["devkit", "train", "val"]
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    (tmp_path / "meta.bin").touch()
    data.prepare_data()
    assert len(asked) == 3


@pytest.mark.parametrize("made", [[], ["train"], ["train", "val"]])
def test_missing_images_say_how_to_obtain_and_arrange_them(tmp_path, made):
    for name in made:
        (tmp_path / name).mkdir()
    with pytest.raises(DataNotFoundError) as caught:
        images(tmp_path)
    for part in (str(tmp_path), "image-net.org", "ILSVRC2012_img_train.tar", "train/CLASS", "--data.data_dir"):
        assert part in str(caught.value)
    assert str(caught.value).count("register at") == 1
    assert ".. " not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_must_be_the_same_in_both_parts(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val" / "cats").mkdir(parents=True)
    (tmp_path / "val" / "cats" / "0.JPEG").symlink_to(folder / "val" / "class0000" / "00000.JPEG")
    with pytest.raises(ValueError, match="differ in their classes, for example in 'cats'"):
        images(tmp_path)


# -- inputs


def test_scored_images_are_the_middle_of_resized_ones(tmp_path):
    from PIL import Image

    data = images(write_image_folder(tmp_path / "a", classes=1, train=1, val=1, size=32))
    wide = Image.new("RGB", (64, 32), (0, 0, 0))
    wide.paste((255, 255, 255), (24, 8, 40, 24))  # a white square in the middle, half of the height
    scored = data.picture(data.eval_transform()(wide).unsqueeze(0))[0]
    # 32 becomes 18 pixels high, of which 16 are kept: the square's 9 pixels lie in the middle.
    assert scored[:, 8, 8].min() > 0.99
    assert scored.sum() / 3 == pytest.approx(81, rel=0.05)
    torch.testing.assert_close(scored, scored.flip(2), atol=0.02, rtol=0)


def test_training_images_are_drawn_anew_and_mirrored(folder):
    data = images(folder, smallest_crop=0.99)
    image, _ = data.val_dataloader().dataset.samples[0]
    from torchvision.datasets.folder import default_loader

    stored = default_loader(image)
    torch.manual_seed(0)
    drawn = torch.stack([data.train_transform()(stored) for _ in range(40)])
    whole = torch.nn.functional.interpolate(data.picture(drawn), size=8)
    first = whole[0]
    mirrored = ((whole - first.flip(2)).abs().mean((1, 2, 3)) < (whole - first).abs().mean((1, 2, 3))).float().mean()
    assert 0.2 < mirrored < 0.8
    assert images(folder, image_size=20).eval_transform()(stored).shape == (3, 20, 20)


# -- order


def test_shares_cover_an_epoch_and_follow_seed_and_epoch_alone():
    data = list(range(12))

    def epoch(number, rank, world_size, seed=0, done=0):
        share = EpochShare(data, 2, rank, world_size, seed, position=lambda: done)
        share.set_epoch(number)
        return list(share)

    both = [epoch(3, rank, 2) for rank in (0, 1)]
    assert sorted(chain(*both)) == data
    alone = epoch(3, 0, 1)
    assert [sorted(pair) for pair in zip(*both, strict=True)] == [sorted(alone[i : i + 2]) for i in range(0, 12, 2)]
    assert alone not in (epoch(4, 0, 1), epoch(3, 0, 1, seed=1))
    assert epoch(3, 0, 1, done=2) == alone[4:]


class Watched(ImageClassifier):
    """Notes the labels of each step."""

    def __init__(self, **options):
        super().__init__("conv", num_classes=3, in_channels=3, **options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a second run
@pytest.mark.parametrize(("schedule", "workers"), [("constant", 0), ("cosine", 0), ("cosine", 1)])
def test_a_run_stopped_within_an_epoch_goes_on_with_the_unseen_images(folder, tmp_path, schedule, workers):
    def run(place, checkpoint=None):
        module = Watched(schedule=schedule)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            callbacks=[ModelCheckpoint(place, filename="a", every_n_train_steps=10)],
            **quiet,
        )
        trainer.fit(module, datamodule=images(folder, workers=workers), ckpt_path=checkpoint)
        return module.seen

    whole = run(tmp_path / "whole")
    assert len(whole) == 14  # two epochs of seven
    assert run(tmp_path / "rest", tmp_path / "whole" / "a.ckpt") == whole[10:]


# -- nets


def test_resnet_v2_is_pre_activated_with_batch_norm():
    for name, size in (("resnetv2_50", 25_549_352), ("resnetv2_101", 44_541_480)):
        with torch.device("meta"):
            net = build_model(name, in_channels=3, num_classes=1000)
        assert sum(p.numel() for p in net.parameters()) == size
        assert not isinstance(list(net.stem.children())[1], nn.BatchNorm2d)  # the first norm comes in the first block
        assert next(type(m).__mro__[1] for m in net.modules() if "Norm" in type(m).__name__) is nn.BatchNorm2d
        first = net.stages[0].blocks[0]
        assert [child for child, _ in first.named_children()][1:6] == ["norm1", "conv1", "norm2", "conv2", "norm3"]


def test_blocks_are_small_and_disjoint():
    with torch.device("meta"):
        net = build_model("resnetv2_50", in_channels=3, num_classes=1000)
    found = blocks(net)
    total = sum(p.numel() for p in net.parameters())
    inside = [{id(p) for p in block.parameters()} for block in found]
    assert sum(map(len, inside)) == len(set().union(*inside))
    assert max(sum(p.numel() for p in block.parameters()) for block in found) < 0.25 * total
    assert sum(sum(p.numel() for p in block.parameters()) for block in found) > 0.98 * total
    assert sum(type(block).__name__ == "PreActBottleneck" for block in found) == 9  # of the two large stages


@pytest.mark.parametrize(
    ("name", "options", "auxiliary"),
    [
        ("torchvision/inception_v3", {}, 1),
        ("timm/inception_v3", {"aux_logits": True}, 1),
        ("torchvision/googlenet", {}, 2),
    ],
)
def test_nets_with_auxiliary_logits_give_the_main_ones_first(name, options, auxiliary):
    with torch.device("meta"):
        module = ImageClassifier(name, num_classes=7, in_channels=3, model_options=options)
        logits = module(torch.zeros(2, 3, 299, 299))
    assert isinstance(logits, tuple)
    assert [tuple(part.shape) for part in logits] == [(2, 7)] * (1 + auxiliary)
    logits[0].sum().backward()
    assert module.net.fc.weight.grad is not None
    aux = [param for label, param in module.net.named_parameters() if "aux" in label.lower()]
    assert aux
    assert all(param.grad is None for param in aux)
