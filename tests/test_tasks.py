"""Every registered family keeps the interface; the registry and the corpora answer by name."""

import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_hrnn.tasks import CORPORA, FAMILIES, Corpus, check_task, get_corpus, get_family, register
from lightning_hrnn.tasks.catalogue import catalogue
from lightning_hrnn.tasks.functions import Quadratic
from lightning_hrnn.tasks.released import NEURAL_NETS, RELEASED

LARGE = "quadratic-large"  # seconds of work: checked once, at its smallest size
DRAWS = {LARGE: 8, "sparse-gradient": 3000, "sparse-gradient-mlp": 2000}  # 99 % zeros need many samples
SMALL = [name for name in FAMILIES if name != LARGE]


@pytest.mark.parametrize("name", SMALL)
def test_family_conforms(name):
    for seed in range(1 if name in DRAWS else 3):
        generator = torch.Generator().manual_seed(seed)
        check_task(get_family(name, random.Random(seed)), generator, draws=DRAWS.get(name, 64))


def test_large_quadratic_conforms():
    smallest = min(RELEASED[LARGE].families, key=lambda family: family.dim)
    check_task(smallest, torch.Generator().manual_seed(0), count=2, draws=DRAWS[LARGE])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DRAWS])
def test_family_conforms_on_gpu(name):
    check_task(get_family(name, random.Random(0)), torch.Generator("cuda").manual_seed(0), count=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_factory_is_reproducible_named_and_picklable(name):
    families = [get_family(name, random.Random(seed)) for seed in (5, 5)]
    assert families[0] == families[1]
    assert families[0].name == name
    loaded = pickle.loads(pickle.dumps(families[0]))
    assert loaded == families[0]
    assert loaded.name == name


@pytest.mark.parametrize("name", SMALL)
def test_every_configuration_stays_small(name):
    for seed in range(40):
        params, _ = get_family(name, random.Random(seed)).init(1, torch.Generator().manual_seed(seed))
        assert 2 <= sum(p.numel() for p in params) <= (12_000 if name in ("wide-mlp", "few-epochs") else 6_000)


def test_wide_families_draw_different_configurations():
    for name in FAMILIES.keys() - RELEASED.keys() - {"valley"}:
        assert len({repr(get_family(name, random.Random(seed))) for seed in range(10)}) >= 8, name


def test_the_released_sets_are_all_there():
    assert len(RELEASED) == 26
    assert CORPORA["released"].weights.keys() == RELEASED.keys()
    assert RELEASED.keys() - CORPORA["paper"].weights.keys() == set(NEURAL_NETS)
    assert RELEASED.keys() - CORPORA["extended"].weights.keys() == {LARGE}
    assert FAMILIES.keys() - CORPORA["wide"].weights.keys() == {LARGE, "few-epochs"}
    assert CORPORA["balanced"].weights.keys() - CORPORA["wide"].weights.keys() == {"few-epochs"}
    assert CORPORA["wide"].weights.keys() - CORPORA["extended"].weights.keys() == {"attention", "batch-norm-mlp"}
    assert len(CORPORA["quick"].weights) == 6


def test_released_sets_offer_every_configuration():
    for name, released in RELEASED.items():
        drawn = {repr(get_family(name, random.Random(seed))) for seed in range(200)}
        assert drawn == {repr(family) for family in released.families}, name


def test_corpus_draws_by_weight():
    corpus = Corpus("two", "1", {"quadratic": 3.0, "bowl": 1.0})
    rng = random.Random(0)
    names = [corpus.sample(rng).name for _ in range(2000)]
    assert set(names) == {"quadratic", "bowl"}
    assert names.count("quadratic") == pytest.approx(1500, abs=80)  # four standard deviations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: get_corpus("imagenet"),
            "unknown corpus 'imagenet'; known: balanced, extended, full, paper, quick, released, wide",
        ),
        (lambda: get_family("conv", random.Random(0)), "unknown task family 'conv'; known: .*mlp"),
        (lambda: Corpus("mine", "1", {}), "corpus 'mine' has no families"),
        (lambda: Corpus("mine", "1", {"conv": 1.0}), "corpus 'mine': unknown task family 'conv'; known: "),
        (lambda: Corpus("mine", "1", {"mlp": 0.0}), "the weight of 'mlp' must be positive, got 0.0"),
        (lambda: Corpus("mine", "1", {"mlp": float("inf")}), "the weight of 'mlp' must be positive, got inf"),
        (lambda: register("mlp")(lambda rng: Quadratic(2)), "'mlp' is registered already"),
    ],
)
def test_errors_say_what_is_known(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_docs_list_every_family():
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    ours = [name for name in FAMILIES if name not in RELEASED]
    mend = "docs/tasks.md is out of date: replace the table by lightning_hrnn.tasks.catalogue.catalogue(names)"
    assert catalogue(ours) in page, mend
    assert catalogue(RELEASED) in page, mend


def test_nothing_held_out_is_in_a_corpus():
    """No family in the package computes a convolution or a recurrence, nor reads a data set."""
    forbidden = [
        nn.functional.conv1d,
        nn.functional.conv2d,
        nn.functional.unfold,
        torch.gru_cell,
        torch.lstm_cell,
        open,
    ]
    folder = Path(__file__).parents[1] / "lightning_hrnn" / "tasks"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "layer_norm(" in source  # the search would see them
    for function in forbidden:
        assert f"{function.__name__}(" not in source
