"""The reference of every setting: complete, and as the code is."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

import adrank
from features.events import TYPES
from service.api.wire import Behaviour, Diversity, Options, RankRules
from service.settings import PREFIX, Settings
from training.networks import NETWORKS
from training.train_settings import TrainSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_the_code_is(reference: ModuleType) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "run make reference"


def test_nothing_that_can_be_set_is_missing() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    names = [PREFIX + name.upper() for name in Settings.model_fields]
    names += [
        field.name for kind in (TrainSettings, *(network.settings for network in NETWORKS.values())) for field in dataclasses.fields(kind)
    ]
    names += [*Options.model_fields, *RankRules.model_fields, *Diversity.model_fields, *Behaviour.model_fields, *TYPES]
    names += ["options.explore` of the policy `thompson"]
    missing = [name for name in names if f"`{name}`" not in page]
    assert not missing


def test_a_class_that_says_nothing_of_itself_is_refused(reference: ModuleType) -> None:
    @dataclasses.dataclass
    class Silent:
        count: int = 1
        """Something."""
        silent: int = 2

    with pytest.raises(reference.UndescribedError, match=r"say below silent what it is"):
        reference.described(Silent)


@pytest.mark.parametrize("name", sorted(adrank.cli.commands))
def test_every_command_and_each_of_its_options_says_what_it_is(name: str) -> None:
    command = adrank.cli.commands[name]
    assert command.help
    assert command.epilog is None or "adrank" in command.epilog
    for option in command.params:
        if isinstance(option, click.Option) and option.help is None:
            assert option.name in ("split", "rows_per_file", "connections"), f"{name} --{option.name} says nothing of itself"
