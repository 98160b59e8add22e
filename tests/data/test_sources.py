"Where data comes from: one rule for every command, tried with the real command line."
import shutil
from pathlib import Path

import pytest

from grocery_nb.catalog import DataError, data_dir, data_path, get_classes, source_name
from grocery_nb.core import GroceryError


@pytest.fixture
def shop(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "own-shop"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    "A home folder of its own, with no data anywhere"
    monkeypatch.delenv("GROCERY_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_validate_without_a_source_looks_at_the_environment(grocery, shop):
    done = grocery("data", "validate", GROCERY_DATA_DIR=str(shop))
    assert done.stdout.splitlines()[-1].startswith("own-shop: ") and done.returncode == 0, done.stderr


def test_an_empty_variable_is_none(grocery, shop, monkeypatch):
    monkeypatch.setenv("GROCERY_DATA_DIR", "")
    assert data_path() == data_path("mini") and source_name() == "mini"


def test_a_name_goes_before_the_environment(shop, monkeypatch):
    mini = data_path("mini")
    monkeypatch.setenv("GROCERY_DATA_DIR", str(shop))
    assert data_path("mini") == mini != shop and source_name("mini") == "mini"
    assert data_path() == data_path("grocery") == shop and source_name() == str(shop) and source_name("grocery") == "grocery"


def test_the_home_folder_is_understood(shop, home, monkeypatch):
    shutil.move(shop, home / "own-shop")
    monkeypatch.setenv("GROCERY_DATA_DIR", "~/own-shop")
    assert data_dir() == data_dir("~/own-shop") == home / "own-shop" and source_name("~/own-shop") == str(home / "own-shop")


def test_the_root_of_a_clone_is_understood_everywhere(shop, tmp_path, monkeypatch, grocery):
    shutil.copytree(shop, tmp_path / "GroceryStoreDataset" / "dataset")
    clone = tmp_path / "GroceryStoreDataset"
    assert data_dir(clone) == clone / "dataset" and source_name(clone) == str(clone / "dataset")
    monkeypatch.setenv("GROCERY_DATA_DIR", str(clone))
    assert data_dir() == data_dir("grocery") == clone / "dataset"
    assert grocery("data", "validate").returncode == grocery("data", "validate", "grocery").returncode == 0


def test_the_place_of_the_labs_is_found_before_anything_is_downloaded(shop, home, monkeypatch, caches):
    monkeypatch.setattr("requests.get", lambda *a, **k: pytest.fail("asked the network"))
    assert data_path("grocery") == caches / "grocery-store"
    shutil.copytree(shop, home / "GroceryStoreDataset" / "dataset")
    assert data_dir("grocery") == home / "GroceryStoreDataset" / "dataset" and source_name("grocery") == "grocery"
    assert data_path() == data_path("mini"), "without a name it is not taken: a clone is no wish"


def test_a_folder_of_one_s_own_that_has_a_sub_folder_dataset(shop):
    shutil.copytree(shop, shop / "dataset")
    assert data_dir(shop) == shop


@pytest.mark.parametrize("source, words", [("", "A path is empty"), ("gone", "'gone', which is no folder"), ("~nobody-here/x", "home folder")])
def test_a_source_that_cannot_be_is_one_sentence(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GroceryError, match=words) as error: data_dir(source)
    assert "\n" not in str(error.value)


def test_a_card_s_name_holds_in_another_folder(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(shop.parent)
    name = source_name("own-shop")
    monkeypatch.chdir("/")
    assert data_dir(name) == shop


def test_no_home_is_no_traceback(home, monkeypatch, caches):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Python does where nobody knows the home folder
    assert data_path("grocery") == caches / "grocery-store"
