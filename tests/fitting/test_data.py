"""Images for fitting: where they come from, that they are the same at every pass, and what is said of bad ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgeon.errors import DataError
from surgeon.files.names import Trust
from surgeon.fitting import data, stored
from surgeon.models.call import Inputs

GREY = nn.Sequential(nn.Conv2d(1, 2, 3))
COLOUR = nn.Sequential(nn.Conv2d(3, 2, 3))
BYTES = torch.randint(256, (10, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FLOATS = torch.randn(10, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


def all_images(given: data.Data) -> Tensor:
    return torch.cat([batch.inputs.args[0] for batch in given])


def all_labels(given: data.Data) -> list[int]:
    return [int(label) for batch in given if batch.labels is not None for label in batch.labels]


def in_order(given: data.Data, count: int = 10, seed: int = 0) -> Tensor:
    """The images by their numbers in the source."""
    back = torch.empty(count, dtype=torch.int64)
    back[torch.randperm(count, generator=torch.Generator().manual_seed(seed))] = torch.arange(count)
    return all_images(given)[back]


def written(folder: Path, name: str, **arrays: Tensor) -> str:
    """A file of these arrays; the first one alone where the format holds one."""
    path, first = folder / name, next(iter(arrays.values()))
    if path.suffix == ".npy":
        numpy.save(path, first.numpy())
    elif path.suffix == ".npz":
        numpy.savez(path, **{key: value.numpy() for key, value in arrays.items()})
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch.save(arrays, path)
    return str(path)


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.safetensors", "x.pt"])
def test_arrays_of_every_format_are_the_same_images_at_every_pass(tmp_path: Path, name: str) -> None:
    given = data.read(written(tmp_path, name, images=FLOATS, y=LABELS), COLOUR, batch=4)
    assert torch.equal(in_order(given), FLOATS)
    assert torch.equal(all_images(given), all_images(given))
    assert [batch.count for batch in given] == [4, 4, 2]
    assert (len(given), given.images, given.has_labels) == (3, 10, False)
    assert "floats count as already preprocessed" in given.preprocessing
    if name != "x.npy":
        own = data.read(tmp_path / name, COLOUR, labels="own")
        assert torch.equal(all_images(own), FLOATS[all_labels(own)])


def test_digests_tell_numbers_order_batches_and_preprocessing_apart(tmp_path: Path) -> None:
    path = written(tmp_path, "x.npy", x=BYTES)

    def digest(**options: Any) -> str:
        return data.read(path, COLOUR, **{"preprocess": "none", **options}).digest

    others = [{"seed": 1}, {"batch": 3}, {"images": 5}, {"preprocess": "mean=0.5,std=0.5"}]
    assert len({digest(), *(digest(**one) for one in others)}) == 5
    before = digest()
    assert digest() == before
    assert digest(labels=LABELS) == before
    changed = BYTES.clone()
    changed[3, 0, 0, 0] += 1
    written(tmp_path, "x.npy", x=changed)
    assert digest() != before


def test_a_digest_is_the_same_in_every_process() -> None:
    x = torch.arange(480, dtype=torch.float32).view(10, 3, 4, 4)
    assert data.of(x, batch=4).digest == "3146ab1938760cfd5fadd2da26e9b5d2018ad8719fa34149adedd0ec754f7e0b"
    assert data.of([*x.split(4)]).digest == "007c1e4015089978b48c975f18da55acacfb8656546f298f5335791881b258ad"


def test_bytes_are_scaled_and_normalised_and_channels_may_be_last(tmp_path: Path) -> None:
    spec = "mean=0.1/0.2/0.3,std=0.5/0.4/0.3"
    mean, deviation = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    right = (BYTES.float() / 255 - mean) / deviation
    first = data.read(written(tmp_path, "a.npz", a=BYTES, b=LABELS), COLOUR, preprocess=spec)
    last = data.read(written(tmp_path, "b.npy", a=BYTES.permute(0, 2, 3, 1).contiguous()), COLOUR, preprocess=spec)
    torch.testing.assert_close(in_order(first), right, rtol=0, atol=1e-6)
    assert torch.equal(all_images(first), all_images(last))
    assert "channels last" in last.preprocessing
    assert "mean 0.1/0.2/0.3 and deviation 0.5/0.4/0.3" in last.preprocessing
    assert "--preprocess" in last.preprocessing


def test_greyscale_bytes_need_no_axis_of_channels_and_colours_become_grey() -> None:
    flat = data.of(BYTES[:, 0], GREY, preprocess="none")
    assert torch.equal(in_order(flat), BYTES[:, :1].float() / 255)
    grey = data.of(BYTES, GREY, preprocess="none")
    assert all_images(grey).shape == (10, 1, 6, 5)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(in_order(grey), (BYTES.float() * weights).sum(1, keepdim=True) / 255, rtol=0, atol=4e-3)


def test_one_of_several_arrays_is_named_with_a_colon(tmp_path: Path) -> None:
    path = written(tmp_path, "x.npz", train_x=FLOATS, test_x=FLOATS[:4] + 1, train_y=LABELS, test_y=LABELS[:4])
    assert torch.equal(in_order(data.read(f"{path}:test_x", COLOUR), 4), FLOATS[:4] + 1)
    assert all_labels(data.read(f"{path}:train_x", COLOUR, labels="own", batch=1, images=3))
    with pytest.raises(DataError, match=r"several arrays that may be the images .*x\.npz:train_x"):
        data.read(path, COLOUR)
    with pytest.raises(DataError, match="there is no array 'x'"):
        data.read(f"{path}:x", COLOUR)


def test_members_of_an_npz_are_unpacked_once_and_only_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loads = written(tmp_path, "x.npz", x=FLOATS, other=torch.zeros(3)), []
    load = numpy.load
    monkeypatch.setattr(numpy, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    given = data.read(path, COLOUR, batch=2)
    assert torch.equal(all_images(given), all_images(given))
    assert len(loads) == 1


def test_the_first_of_a_seeded_permutation_are_taken_with_their_labels() -> None:
    given = data.of((FLOATS, LABELS), COLOUR, images=4, seed=3, labels="own")
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:4]
    assert torch.equal(all_images(given), FLOATS[order])
    assert all_labels(given) == order.tolist()
    assert "4 of 10 images in the order of seed 3" in given.preprocessing


@pytest.mark.parametrize("make", [lambda: FLOATS, lambda: [*FLOATS.split(2)]], ids=["array", "batches"])
def test_shares_parts_and_later_starts_are_the_same_batches(make: Any) -> None:
    whole = data.of(make(), COLOUR, **({"batch": 2} if isinstance(make(), Tensor) else {}))
    shares = [whole.share(rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    for i, batch in enumerate(whole):
        again = [*shares[i % 3]][i // 3]
        assert torch.equal(batch.inputs.args[0], again.inputs.args[0])
        assert torch.equal(batch.inputs.args[0], next(whole.batches(i)).inputs.args[0])
    rest, held = whole.held_back(3, seed=1)
    assert (rest.images, held.images) == ((7, 3) if isinstance(make(), Tensor) else (6, 4))
    together = torch.cat([all_images(rest), all_images(held)]).flatten(1)
    assert {tuple(row.tolist()) for row in together} == {tuple(row.tolist()) for row in FLOATS.flatten(1)}
    assert len({whole.digest, rest.digest, held.digest, *(share.digest for share in shares)}) == 6
    assert data.of(make(), COLOUR, **({"batch": 2} if isinstance(make(), Tensor) else {})).digest == whole.digest
    with pytest.raises(DataError, match="10 of 10 images cannot be held back"):
        whole.held_back(10, seed=0)


def test_a_loader_of_pairs_has_labels_where_they_are_asked_for() -> None:
    pairs = DataLoader(TensorDataset(FLOATS, LABELS), batch_size=4)
    assert next(iter(data.of(pairs, COLOUR))).labels is None
    own = data.of(pairs, COLOUR, labels="own")
    assert all_labels(own) == [*range(10)]
    assert torch.equal(all_images(own), FLOATS)
    assert all_labels(data.of(pairs, COLOUR, labels=LABELS.flip(0))) == [*range(9, -1, -1)]
    limited = data.of(pairs, COLOUR, labels="own", images=6)
    assert [batch.count for batch in limited] == [4, 2]
    assert all_labels(limited) == [*range(6)]


def test_dicts_are_taken_apart_by_what_the_model_takes() -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    both = [{"left": FLOATS, "right": FLOATS + 1, "path": ["a"] * 10, "labels": LABELS}]
    (batch,) = data.of(both, Two(), labels="own")
    assert [*batch.inputs.kwargs] == ["left", "right"]
    assert all_labels(data.of(both, Two(), labels="own")) == LABELS.tolist()
    (batch,) = data.of([{"image": FLOATS, "mask": LABELS[:, None, None]}], COLOUR)
    assert torch.equal(batch.inputs.args[0], FLOATS)
    with pytest.raises(DataError, match="a dict of a, b, which does not show the images"):
        data.of([{"a": FLOATS, "b": FLOATS}], COLOUR)


def test_a_detectors_pictures_and_whole_calls_are_taken_as_they_are() -> None:
    pictures = [torch.rand(3, 4, 5), torch.rand(3, 6, 4)]
    (batch,) = data.of([(pictures, [{"boxes": torch.zeros(1, 4)}] * 2)])
    assert batch.count == 2
    assert [tuple(one.shape) for one in batch.inputs.args[0]] == [(3, 4, 5), (3, 6, 4)]
    (batch,) = data.of([Inputs((FLOATS,), {"mask": LABELS})])
    assert [*batch.inputs.kwargs] == ["mask"]


def test_a_loader_draws_the_same_at_every_pass_and_nobody_elses_states_change() -> None:
    """A shuffled DataLoader, and augmentation that draws: both from the global states, which others draw from too."""

    def augmented() -> Iterator[Tensor]:
        for (images,) in DataLoader(TensorDataset(FLOATS), batch_size=4, shuffle=True):
            yield images + random.random() + float(numpy.random.rand()) + torch.rand(1)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    given = data.of(augmented)
    first = []
    for batch in given:
        first.append(batch.inputs.args[0])
        random.random(), numpy.random.rand()
    assert torch.equal(torch.cat(first), all_images(given))
    assert torch.equal(torch.rand(3), expected)
    shifts = [float((images - FLOATS[:1]).abs().min()) for images in first]
    assert len(set(shifts)) == len(shifts)  # the states go on from batch to batch


def test_a_function_is_called_again_only_where_iterating_again_does_not_do(tmp_path: Path) -> None:
    calls = []

    def twice() -> list[Tensor]:
        calls.append(1)
        return [*FLOATS.split(5)]

    def seeded() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(FLOATS), batch_size=5, shuffle=True, generator=generator)

    all_images(data.of(twice))
    assert len(calls) == 1
    given = data.of(seeded)
    assert torch.equal(all_images(given), all_images(given))
    with pytest.raises(DataError, match=r"other batches at its second pass\. .*shuffle=False"):
        data.of(seeded())


def test_a_loader_that_changes_later_is_found() -> None:
    batches = [*FLOATS.split(5)]
    given = data.of(batches)
    batches[1] = batches[1] + 1
    with pytest.raises(DataError, match="gives another batch 1 than at its first pass"):
        all_images(given)
    batches.pop()
    with pytest.raises(DataError, match="gives fewer batches"):
        all_images(given)
    batches[:] = [*FLOATS.split(5), FLOATS]
    with pytest.raises(DataError, match="gives another batch 2"):
        all_images(given)


def test_functions_are_named_as_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "loading_for_fit.py"
    file.write_text(
        "import torch\n"
        "def loader():\n    for i in range(2):\n        yield torch.rand(3, 3, 4, 4), torch.tensor([i, 1, 2])\n"
        "def array():\n    return torch.rand(5, 3, 4, 4)\n"
        "def broken():\n    raise OSError('no disk')\n"
        "def nothing():\n    return []\n"
        "def number():\n    return 3\n"
    )
    given = data.read(f"{file}:loader", COLOUR, labels="own")
    assert all_labels(given) == [0, 1, 2, 1, 1, 2]
    assert "as already preprocessed" in given.preprocessing
    assert data.read(f"{file}:array", COLOUR, batch=2).images == 5
    for name, said in {
        "broken": "no disk",
        "nothing": "yields nothing",
        "number": "gives data of type int",
        "no": "has no 'no'",
    }.items():
        with pytest.raises(DataError, match=said):
            data.read(f"{file}:{name}", COLOUR)
    with pytest.raises(DataError, match="makes its own batches"):
        data.read(f"{file}:loader", COLOUR, batch=3)


def test_noise_is_drawn_from_the_seed_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    example = Inputs((torch.zeros(1, 3, 4, 4),))
    with caplog.at_level(logging.WARNING, "surgeon"):
        given = data.read("noise:5", COLOUR, example=example, batch=2)
    assert "noise is a bad idea" in caplog.text
    assert torch.equal(all_images(given), all_images(data.read("noise:5", COLOUR, example=example, batch=3)))
    assert all_images(given).shape == (5, 3, 4, 4)
    assert not torch.equal(all_images(given), all_images(data.read("noise:5", COLOUR, example=example, seed=1)))
    with pytest.raises(DataError, match="noise has neither labels"):
        data.read("noise", COLOUR, example=example, labels="own")
    with pytest.raises(DataError, match="which shape noise should have"):
        data.read("noise", nn.Linear(2, 2))


def test_what_is_given_as_data_stays_as_it_is() -> None:
    given = data.of(FLOATS)
    assert data.of(given) is given
    with pytest.raises(DataError, match="read already"):
        data.of(given, batch=3)
    assert torch.equal(in_order(data.of({"images": FLOATS, "labels": LABELS})), FLOATS)
    assert torch.equal(in_order(data.of(FLOATS.numpy())), FLOATS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (LABELS, "10 of int64, not images"),
        (torch.zeros(4, 3, 2, 2), "all pixels of all images are equal"),
        (torch.full((4, 3, 2, 2), 9, dtype=torch.uint8), "all pixels of all images are equal"),
        (torch.zeros(0, 3, 2, 2), "holds no image"),
        (torch.ones(4, 3, 2, 2, dtype=torch.int64), "neither bytes nor floats"),
        (FLOATS.permute(0, 2, 3, 1), "channels are its last axis"),
        (
            torch.where(torch.arange(10).view(10, 1, 1, 1) == 7, torch.nan, FLOATS),
            r"image 7 \(counted from 0\) holds NaN",
        ),
        (BYTES[:, :2], "has 2 channels"),
        (BYTES[:, 0], "the network takes 3 channels"),
        (BYTES, "the preprocessing of Sequential is not known. Give --preprocess imagenet"),
        ([], "yields nothing"),
        ([torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1).expand(2, 3, 2, 2)] * 2, "all pixels of all images are equal"),
        ([FLOATS, FLOATS / 0], r"batch 1 holds NaN or infinite numbers, in image 0"),
        ([FLOATS, FLOATS[:, :1]], "batch 1 has 1 channels, and those before it 3"),
        ([FLOATS[0]], "which is not a batch of images"),
        (["photo"], "yields a str"),
        ([FLOATS[:0]], "batch 0 .* holds no images"),
        (iter([FLOATS]), "only once"),
        (4, "does not yield batches"),
    ],
)
def test_what_cannot_be_fitted_to_is_one_sentence(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        data.of(
            given,
            COLOUR,
            **({"preprocess": "none"} if given is not BYTES and getattr(given, "dtype", 0) == torch.uint8 else {}),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:9], "9 labels for 10 images"),
        (LABELS + 0.5, r"label 0 \(counted from 0\) is 0.5"),
        (LABELS - 1, r"label 0 \(counted from 0\) is -1"),
        (torch.zeros(10, 4), "labels of shape 10×4"),
        (LABELS > 3, "not whole numbers"),
        ("own", "has no labels of its own"),
        ("nowhere.npy", "there is no file of labels nowhere.npy"),
        ("labels.csv", "not a file of labels"),
        (object(), "cannot be made of"),
    ],
)
def test_labels_that_are_none_are_one_sentence(labels: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data.of(FLOATS, COLOUR, labels=labels)


@pytest.mark.parametrize("name", ["y.npy", "y.npz", "y.pt", "y.safetensors", "y.txt"])
def test_labels_of_every_format(tmp_path: Path, name: str) -> None:
    if name == "y.txt":
        (tmp_path / name).write_text("\n".join(map(str, LABELS.tolist())))
    else:
        written(tmp_path, name, labels=LABELS.double())
    given = data.of(FLOATS, COLOUR, labels=str(tmp_path / name))
    assert torch.equal(all_images(given), FLOATS[all_labels(given)])


def test_files_that_hold_no_images_are_one_sentence(tmp_path: Path) -> None:
    for name in ("x.npz", "x.npy", "x.safetensors", "x.pt"):
        with pytest.raises(DataError, match="there is no file"):
            data.read(tmp_path / name, COLOUR)
        (tmp_path / name).write_bytes(b"no array" * 20)
        with pytest.raises(DataError, match=name):
            data.read(tmp_path / name, COLOUR)
    torch.save({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="holds no arrays"):
        data.read(tmp_path / "x.pt", COLOUR)
    numpy.save(tmp_path / "o.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"o\.npy cannot be read"):
        data.read(tmp_path / "o.npy", COLOUR)
    (tmp_path / "x.csv").touch()
    for source, said in {str(tmp_path / "x.csv"): "none of these", "nowhere": "is not there"}.items():
        with pytest.raises(DataError, match=said):
            data.read(source, COLOUR)
    for option in ("batch", "images"):
        with pytest.raises(DataError, match=f"{option} is 0"):
            data.read("noise", COLOUR, **{option: 0})


def test_big_endian_numbers_are_read_as_what_they_are(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", FLOATS.numpy().astype(">f4"))
    assert torch.equal(in_order(data.read(tmp_path / "x.npy", COLOUR)), FLOATS)


def test_a_file_of_torch_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save(Evil(), tmp_path / "x.pt")
    with pytest.raises(DataError, match="may not be loaded"):
        stored.arrays(tmp_path / "x.pt", Trust())
    assert not (tmp_path / "ran").exists()
