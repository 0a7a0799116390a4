"""Whose weights a checkpoint holds: prefixes, averages, several networks, and what is left over."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.errors import ModelError
from surgeon.files import load as source

NET = "from torch import nn\ndef Net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("weighed", "parcel")]:
        del sys.modules[name]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        source.load(name, **options)
    return str(caught.value)


@pytest.fixture
def state(here: Path) -> dict[str, torch.Tensor]:
    (here / "weighed.py").write_text(NET)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def _under(prefix: str, state: dict[str, torch.Tensor], shift: float = 0) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor + shift if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _first(**options: Any) -> tuple[float, str]:
    loaded = source.load("w.ckpt", arch="weighed.py:Net", **options)
    return float(loaded.model.get_parameter("0.bias").detach()[0]), "; ".join(loaded.notices)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "module.", "_orig_mod.", "model.module.", "a.b.c.d.", "module._orig_mod.model."]
)
def test_any_one_prefix_is_taken_off(prefix: str, state: dict[str, torch.Tensor]) -> None:
    rest = {"criterion.weight": torch.ones(1), "n_averaged": torch.tensor(3)}
    torch.save({"state_dict": _under(prefix, state) | rest, "lr": 0.1}, "w.ckpt")
    value, notices = _first()
    assert value == float(state["0.bias"][0])
    assert f"stripped the prefix '{prefix}' from 7 keys of w.ckpt" in notices
    assert "left over in w.ckpt, and not used: criterion.weight, n_averaged" in notices


def test_of_several_networks_the_user_chooses(state: dict[str, torch.Tensor]) -> None:
    torch.save(_under("student.", state) | _under("teacher.", state, 1), "w.ckpt")
    message = refusal("w.ckpt", arch="weighed.py:Net")
    assert "holds the weights of several such networks, under 'student' and 'teacher'" in message
    assert message.endswith("--weights student")
    assert _first(key="teacher")[0] == pytest.approx(float(state["0.bias"][0]) + 1)
    assert "holds nothing under 'pupil'. It holds student, teacher." in refusal(
        "w.ckpt", arch="weighed.py:Net", key="pupil"
    )


def test_an_average_is_chosen_by_its_key_or_prefix(state: dict[str, torch.Tensor]) -> None:
    trained = float(state["0.bias"][0])
    torch.save({"state_dict": state, "ema": {"state_dict": _under("module.", state, 1)}}, "w.ckpt")
    value, notices = _first()
    assert value == trained
    assert "also holds an average of the weights, under 'ema', not used unless chosen with --weights ema" in notices
    assert _first(key="ema")[0] == _first(key="ema.state_dict")[0] == pytest.approx(trained + 1)
    torch.save({"state_dict": _under("model.", state) | _under("model_ema.", state, 1)}, "w.ckpt")
    value, notices = _first()
    assert value == trained
    assert "under 'model_ema.'; --weights model_ema chooses it" in notices
    assert "left over" not in notices
    assert _first(key="model_ema")[0] == _first(key="state_dict.model_ema")[0] == pytest.approx(trained + 1)


def test_what_lies_in_a_part_of_the_network_is_not_left_over(state: dict[str, torch.Tensor]) -> None:
    torch.save(state | {"0.more": torch.ones(1)}, "w.ckpt")
    assert "1 unexpected (0.more)" in refusal("w.ckpt", arch="weighed.py:Net")
    del state["0.bias"]
    torch.save(_under("model.", state), "w.ckpt")
    assert "missing" in refusal("w.ckpt", arch="weighed.py:Net")


def test_weights_some_levels_down_are_named_by_their_path(state: dict[str, torch.Tensor]) -> None:
    checkpoints: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ema": {"module": state}, "model": None}, "ema.module"),
        ({"a": {"b": {"state_dict": state}}}, "a.b"),
        ({"a": {"b": {"c": {"d": state}}}}, "a.b.c.d"),
    )
    for checkpoint, path in checkpoints:
        checkpoint["itself"] = checkpoint
        torch.save(checkpoint, "w.ckpt")
        message = refusal("w.ckpt", arch="weighed.py:Net")
        assert f"holds weights under {path}, and under none of the usual keys. --weights {path} would" in message
        assert _first(key=path)[0] == float(state["0.bias"][0])
    torch.save({"epoch": 3, "log": {"loss": 1.0}}, "w.ckpt")
    assert "holds neither a model nor weights, but epoch, log" in refusal("w.ckpt", arch="weighed.py:Net")


def test_dates_beside_weights_are_data(state: dict[str, torch.Tensor]) -> None:
    at = datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC)
    torch.save({"state_dict": state, "at": at, "took": datetime.timedelta(hours=1)}, "w.ckpt")
    assert _first()[0] == float(state["0.bias"][0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_without_numbers_or_not_dense_are_named(state: dict[str, torch.Tensor]) -> None:
    key = "0.bias"
    for tensor, why in (
        (state[key].to("meta"), f"{key} in w.ckpt has no numbers: it lies on the meta device"),
        (state[key].to_sparse(), f"{key} in w.ckpt is stored as sparse_coo, and a network takes dense weights"),
    ):
        torch.save({**state, key: tensor}, "w.ckpt")
        message = refusal("w.ckpt", arch="weighed.py:Net")
        assert why in message
        assert "\n" not in message
        assert "exception" not in message


def test_a_number_of_classes_is_advised_only_where_it_can_be_given(here: Path) -> None:
    Path("heads.py").write_text(
        "from torch import nn\n"
        "class Fixed(nn.Sequential):\n"
        "    def __init__(self, classes=10): super().__init__(nn.Conv2d(3, 8, 1), nn.Linear(8, classes))\n"
        "def fixed(): return Fixed()\n"
    )
    convs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(8, 10)).state_dict()
    torch.save(convs, "w.ckpt")
    assert "classes" not in refusal("w.ckpt", arch="heads.py:Fixed")
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 4)).state_dict(), "w.ckpt")
    assert refusal("w.ckpt", arch="heads.py:Fixed").endswith("If it has 4 classes: --arch-arg classes=4")
    assert "classes" not in refusal("w.ckpt", arch="heads.py:fixed")
    sys.modules.pop("heads")


def test_whole_networks_and_factories_have_no_choice(state: dict[str, torch.Tensor]) -> None:
    torch.save(net(), "m.pt")
    assert source.load("m.pt", key="ema").notices == ("m.pt holds a whole network; --weights is ignored",)
    assert "is no file of weights. Leave out --weights ema" in refusal("weighed.py:Net", key="ema")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_weights_are_told_what_they_are(state: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": {"0.weight": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}}, "w.ckpt")
    assert "w.ckpt holds quantised weights (0.weight)" in refusal("w.ckpt", arch="weighed.py:Net")
    torch.save({"0._packed_params": (torch.ones(1), None), "0.scale": torch.ones(1)}, "w.ckpt")
    assert "w.ckpt holds quantised weights (0._packed_params)" in refusal("w.ckpt", arch="weighed.py:Net")


def test_a_file_in_a_package_is_imported_as_its_part(here: Path) -> None:
    folder = Path("src/parcel/deep")
    folder.mkdir(parents=True)
    Path("src/parcel/__init__.py").touch()
    (folder / "__init__.py").touch()
    Path("src/parcel/parts.py").write_text("from torch import nn\nclass Part(nn.Conv2d): pass\n")
    (folder / "nets.py").write_text(
        "from torch import nn\nfrom ..parts import Part\n"
        "class Net(nn.Sequential):\n    def __init__(self): super().__init__(Part(3, 4, 3))\n"
    )
    name = "src/parcel/deep/nets.py:Net"
    model = source.load(name).model
    assert type(model).__module__ == "parcel.deep.nets"
    torch.save(model, "m.pt")
    for known in [known for known in sys.modules if known.startswith("parcel")]:
        del sys.modules[known]
    assert "parcel.deep.nets.Net" in refusal("m.pt")
    assert type(source.load("m.pt", arch=name).model[0]).__name__ == "Part"
