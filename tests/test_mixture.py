"""acorn/data/mixture.py: proportions at every prefix, the streams of the datasets, and errors for invalid mixtures."""

from fractions import Fraction

import numpy as np
import pytest
from helpers import make_dataset

from acorn import UserError
from acorn.data.batches import sample_windows
from acorn.data.mixture import load_mixture, origins
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import ByteTokenizer, train_char


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write datasets a and b with the same tokenizer, and c with another one."""
    byte = ByteTokenizer()
    make_dataset(tmp_path / "data" / "a", byte, "first " * 300)
    make_dataset(tmp_path / "data" / "b", byte, "second and last " * 40)
    make_dataset(tmp_path / "data" / "c", train_char(["some text"]), "some text" * 100)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("weights", [(4, 1), (1, 4), (1, 1, 1), (70, 20, 7, 3), (1, 1000), (333, 667)])
def test_proportions_hold_at_every_prefix_and_each_stream_is_in_order(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    taken = [0] * len(weights)
    for i, (which, index) in enumerate(origins(0, 3000, shares)):
        assert index == taken[which]  # no sample is skipped or repeated
        taken[which] += 1
        for count, share in zip(taken, shares, strict=True):
            assert abs(count - (i + 1) * share) <= len(weights) / 2
    far = 10**15
    pieces = [next(origins(far + i, 1, shares)) for i in range(20)]
    assert pieces == list(origins(far, 20, shares))
    assert abs(pieces[0][1] - far * shares[pieces[0][0]]) <= len(weights) / 2


def test_mixture_samples_match_the_datasets_for_any_batch_split(data):
    mixture = load_mixture("a:0.75, b:0.25")
    assert mixture.shares == [Fraction(3, 4), Fraction(1, 4)]
    x, y, documents = mixture.sample(16, 0, 400, seed=3)
    assert documents is None
    which = np.array([k for k, _ in origins(0, 400, mixture.shares)])
    assert (which == 1).sum() == 100
    for k, dataset in enumerate(mixture.datasets):  # several epochs of b
        expected = sample_windows(dataset.train, 16, 0, (which == k).sum(), seed=3)
        assert (x[which == k] == expected[0]).all() and (y[which == k] == expected[1]).all()
    for first, count in ((0, 1), (7, 4), (399, 1)):
        part = mixture.sample(16, first, count, seed=3)
        assert (part[0] == x[first : first + count]).all() and (part[1] == y[first : first + count]).all()


def test_mixture_of_one_dataset_matches_the_dataset(data):
    one, alone = load_mixture("a"), load_dataset("a")
    assert one.identity() == alone.identity() and one.path == "data/a" and one.vocab_size == 257
    for mine, expected in zip(one.sample(16, 5, 9, 1)[:2], sample_windows(alone.train, 16, 5, 9, 1), strict=True):
        assert (mine == expected).all()


def test_mixture_identity_depends_on_datasets_and_proportions(data):
    identities = [load_mixture(spec).identity() for spec in ("a:0.8,b:0.2", "a:4,b:1", "a:.8,b:.3", "b:.2,a:.8", "a")]
    assert identities[0] == identities[1] and len(set(identities)) == 4


def test_dataset_names_may_contain_colons_and_commas(data, tmp_path):
    for name in ("12:30", "to be, or not", "x:y,z"):
        make_dataset(tmp_path / "data" / name)
        assert load_mixture(name).datasets[0].name == name
    with pytest.raises(UserError, match="there is no dataset 'C:"):
        load_mixture("C:\\data\\mine")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a:0.8,b", "'b' should be NAME:PROPORTION"),
        ("a:0.8,b:-0.2", "'b:-0.2' should be"),
        ("a:0.8,", "'' should be"),
        ("a:1,b:0", "'b:0' should be"),
        ("a:1,b:1e999999999", "should be NAME:PROPORTION"),
        ("a:1,a:2", "names data/a twice"),
        ("a, b", "needs their proportions, such as --dataset=a:0.5,b:0.5"),
        ("a:1,nowhere:2", "there is no dataset 'nowhere'"),
        ("a:1,b:1,c:2", "data/a has byte .* data/c has char .* --tokenizer data/a"),
    ],
)
def test_invalid_mixture_raises_a_clear_error(data, spec, message):
    with pytest.raises(UserError, match=message):
        load_mixture(spec)
