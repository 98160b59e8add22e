"""`kill -9` at random moments: never a torn checkpoint, and in the end the weights of a training that nobody killed."""
import pytest
from killed import torture


@pytest.fixture(autouse=True)
def warm(tiny, caches):
    "The pixel cache is there before the first kill, so that the kills fall into the training"
    from grocery_nb.data_utils import Preprocessing, get_loaders
    get_loaders(16, root=tiny, preprocessing=Preprocessing(size=48, resize=56))


def test_a_few_kills(tiny, tmp_path):
    found = torture(tiny, tmp_path, kills=6)
    assert found["kills"] == 6 and found["checkpoints read"] > 0 and found["finished"] > 0
    assert found["identical"], "a resumed training ended with other weights or another history"


@pytest.mark.slow
def test_a_hundred_kills(tiny, tmp_path):
    found = torture(tiny, tmp_path, kills=100, seed=1)
    print(found)
    assert found["kills"] == 100 and found["identical"]


def test_the_check_sees_a_torn_checkpoint(tmp_path):
    from grocery_nb.training.states import CheckpointError, write_state
    from killed import check_whole
    file = write_state(tmp_path / "checkpoint-00000001.pt", {"step": 1})
    assert check_whole(tmp_path) == 1
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError): check_whole(tmp_path)
