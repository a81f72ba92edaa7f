from pathlib import Path

import pytest

from training.networks import NETWORKS
from training.train_settings import TrainError, TrainSettings, overridden
from training.tuned import FOLDER, known, names_of, settings_in


def written(folder: Path, text: str) -> Path:
    (folder / "my.toml").write_text(text)
    return folder / "my.toml"


def test_what_stands_above_is_for_all_that_have_it_and_a_table_for_its_network(tmp_path: Path) -> None:
    path = written(tmp_path, 'batch = 64\nhidden = [8, 4]\nint8 = false\nattention = [3]\n[deepfm]\nbatch = 32\nregularise = "batch"\n')
    assert settings_in(path, "deepfm") == {"batch": "32", "hidden": "8-4", "int8": "false", "regularise": "batch"}
    assert settings_in(path, "din") == {"batch": "64", "hidden": "8-4", "int8": "false", "attention": "3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch =", "is no TOML"),
        ("bach = 3", "no network and no training has a setting 'bach'"),
        ("[deepfn]\nbatch = 3", "there is no network 'deepfn'; there are .*deepfm"),
        ("batch = [1.5]", r"batch is \[1.5\]; it must be a text, a number, true, false, or whole numbers"),
    ],
)
def test_what_is_no_setting_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        settings_in(written(tmp_path, text), "deepfm")
    with pytest.raises(TrainError, match=r"cannot read .*none.toml: No such file"):
        settings_in(tmp_path / "none.toml", "deepfm")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_settings_that_are_known_are_settings(path: Path) -> None:
    assert known(path.stem) == path
    for family, network in NETWORKS.items():
        given = {name: value for name, value in settings_in(path, family).items() if name in names_of(family)}
        overridden(given, network.settings(), TrainSettings())
    assert known("../frappe") is None
