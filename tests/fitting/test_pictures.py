"""Pictures, made what a model was trained to see: as its own library makes them, or as the user says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import DataError
from surgeon.fitting import data, preprocess
from surgeon.models.call import Inputs

COLOUR, GREY = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Coarse random colours, so that resizing has edges to work on."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(256, (7 * 5 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (7, 5), bytes(coarse.tolist())).resize((width, height)).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat/b.png", "cat/a.bmp", "dog/deep/c.PNG", "eel/d.webp")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 30, i).save(path, lossless=True)
    (tmp_path / "photos" / "notes.txt").touch()
    return tmp_path / "photos"


def first(given: data.Data) -> Tensor:
    image: Tensor = next(iter(given)).inputs.args[0]
    return image


@pytest.mark.parametrize(("width", "height"), [(301, 200), (150, 403), (224, 224)])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "efficientnet_b0", "inception_v3"])
def test_torchvisions_networks_get_what_their_weights_want(name: str, width: int, height: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if "inc" in name else {}))
    weights = next(iter(torchvision.models.get_model_weights(name)))
    found = preprocess.known(model, None)
    image = picture(width, height)
    torch.testing.assert_close(found.tensor(image), weights.transforms()(image), rtol=0, atol=1e-6)
    assert str(weights) in str(found)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto", "test_vit"])
def test_timms_networks_get_what_timm_gives_them(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    found = preprocess.known(model, None)
    for image in (picture(301, 200), picture(150, 403)):
        torch.testing.assert_close(found.tensor(image), transform(image), rtol=0, atol=1e-6)
    assert "timm's" in str(found)


def test_a_class_of_torchvision_with_other_layers_is_known_by_its_class() -> None:
    found = preprocess.known(torchvision.models.resnet18(num_classes=7), None)
    assert found.size == (224, 224)
    assert "torchvision's for ResNet" in str(found)
    with pytest.raises(DataError, match="does not take single pictures"):
        preprocess.known(torchvision.models.video.r3d_18(), None)


def test_the_size_is_that_of_the_example_that_is_known() -> None:
    found = preprocess.known(torchvision.models.resnet18(), None, example=Inputs((torch.zeros(1, 3, 64, 96),)))
    assert (found.size, found.resized) == ((64, 96), (73, 110))
    assert found.tensor(picture(40, 30)).shape == (3, 64, 96)
    said = preprocess.known(COLOUR, "size=32", example=Inputs((torch.zeros(1, 3, 64, 64),)))
    assert said.size == (32, 32)


def test_a_folder_is_read_at_any_depth_sorted_by_path(folder: Path) -> None:
    given = data.read(folder, COLOUR, preprocess="none", labels="own")
    batch = next(iter(given))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() != ".txt" and path.is_file())
    for image, number, label in zip(batch.inputs.args[0], order, batch.labels, strict=True):
        pixels = Image.open(paths[number]).convert("RGB")
        right = torchvision.transforms.functional.to_tensor(pixels)
        assert torch.equal(image, right)
        assert label == [0, 0, 1, 2][number]
    assert "cat = 0, dog = 1, eel = 2" in given.preprocessing
    assert "left as large as they are" in given.preprocessing
    assert data.read(folder, COLOUR, preprocess="none").digest == given.digest


def test_greyscale_models_get_greyscale_and_the_user_may_name_the_numbers(folder: Path) -> None:
    given = data.read(folder, GREY, preprocess="size=20x16,mean=0.2,std=0.4,interpolation=bicubic")
    assert first(given).shape == (4, 1, 20, 16)
    assert "greyscale" in given.preprocessing
    assert "the middle 20×16" in given.preprocessing
    assert first(data.read(folder, COLOUR, preprocess="imagenet")).shape == (4, 3, 224, 224)


def test_a_detector_gets_a_list_of_pictures_as_large_as_they_are(folder: Path) -> None:
    picture(20, 10, 9).save(folder / "e.png")
    with torch.device("meta"):
        model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    images = first(data.read(folder, model))
    assert sorted(tuple(one.shape) for one in images) == [(3, 10, 20), *[(3, 30, 40)] * 4]
    assert float(images[0].max()) <= 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("imagnet", "'imagnet'"),
        ("size=0", "the size '0'"),
        ("size=8,size=9", "'size=9'"),
        ("mean=0.5", "a mean without std"),
        ("mean=0.5,std=0", "all above 0"),
        ("mean=0.5/0.5,std=0.1", "as many numbers as mean"),
        ("mean=a,std=1", "'a'"),
        ("mean=nan,std=1", "'nan'"),
        ("size=9,resize=8", "smaller than size"),
        ("interpolation=best", "none of bilinear"),
        ("mean=0.1/0.2,std=0.1/0.2", "do not fit a network of 3"),
    ],
)
def test_a_preprocessing_that_cannot_be_read_is_one_sentence(spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        preprocess.known(COLOUR, spec)
    assert "size=64,mean=0.2860,std=0.3530" in str(caught.value)


def test_bad_folders_are_one_sentence(folder: Path) -> None:
    def said(**options: object) -> str:
        with pytest.raises(DataError) as caught:
            data.read(folder, **{"model": COLOUR, "preprocess": "none", **options})
        return str(caught.value)

    assert "the preprocessing of Conv2d is not known" in said(preprocess=None)
    assert "takes 4" in said(model=nn.Conv2d(4, 1, 1))
    picture(20, 10).save(folder / "e.png")
    assert "not of one size" in said()
    assert "lies in no sub-folder" in said(labels="own")
    (folder / "e.png").write_bytes((folder / "cat" / "b.png").read_bytes()[:60])
    assert "e.png cannot be read" in said()
    Image.new("I;16", (40, 30)).save(folder / "e.png")
    assert "more than 8 bits" in said()
    (folder / "e.png").unlink()
    assert "3 labels for 4 images" in said(labels=[1, 2, 3])
    for path in folder.rglob("*.*"):
        if path.is_file() and path.suffix != ".txt":
            Image.new("RGB", (8, 8), (9, 8, 7)).save(path, lossless=True)
    assert "all pixels of all images are equal" in said()
    Image.new("RGB", (8, 8), (9, 8, 8)).save(folder / "cat" / "b.png")
    assert first(data.read(folder, COLOUR, preprocess="none")).shape == (4, 3, 8, 8)


def test_a_picture_cut_short_is_named(folder: Path) -> None:
    whole = (folder / "cat" / "b.png").read_bytes()
    (folder / "cat" / "b.png").write_bytes(whole[:-400])
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        data.read(folder, COLOUR, preprocess="none")


def test_without_pillow_a_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for source in (folder, torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)):
        with pytest.raises(DataError, match=r"cannot be read without pillow\. pip install pillow"):
            data.of(source, COLOUR, preprocess="size=4")


def test_hidden_files_are_no_pictures_and_transparent_ones_are(folder: Path) -> None:
    (folder / "._cat.png").write_bytes(b"what macOS keeps beside files")
    picture(40, 30).convert("P").save(folder / "e.png", transparency=b"\x00\x80")
    assert first(data.read(folder, COLOUR, preprocess="none")).shape == (5, 3, 30, 40)


def test_a_picture_that_would_take_all_memory_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match="DecompressionBombError"):
        data.read(folder, COLOUR, preprocess="none")


def test_a_folder_without_pictures_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        data.read(tmp_path, COLOUR, preprocess="none")
