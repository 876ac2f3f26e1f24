import logging

import pytest
import torch

from experiments import sweep
from fedlora.config.config import UNRELEASED
from fedlora.config.sections import MANY_CLASSES, AdapterConfig
from fedlora.errors import InputError
from fedlora.models import label_words, trainable
from fedlora.models.tasks import base_model

LABELS = ("scam_identity", "Limit", "cashback-swipe")  # in the tiny encoder's vocabulary


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("IncreaseDecreaseInAccountsPayable", "increase decrease in accounts payable"),
        ("Refund_not_showing_up", "refund not showing up"),
        ("credit-card / prepaid", "credit card prepaid"),
        ("USGaapTag", "us gaap tag"),
        ("Top5Banks", "top5 banks"),
        ("Größe_über", "größe über"),
        ("creditÖsterreich", "credit österreich"),
        ("cafe\u0301", "café"),  # decomposed
        ("ऋण_खाता", "ऋण खाता"),  # vowel signs are no letters
        ("เงินฝาก", "เงินฝาก"),
        ("__", ""),
    ],
)
def test_words_of_a_label(label, said):
    assert label_words.words(label) == said


@pytest.fixture
def work(tiny_config):
    return trainable.load(tiny_config(**{"adapter.head": "labels"}), LABELS)


def pooled(work, text):
    ids = torch.tensor(work.task.encode([text], [LABELS[0]], LABELS).ids)
    with torch.no_grad():
        return base_model(work.model).pooled(ids, torch.ones_like(ids))[0]


def test_a_text_of_a_labels_own_words_is_given_that_label(work):
    (weight,) = (t for n, t in work.start.only(("head",)).items() if n.endswith("weight"))
    for number, label in enumerate(LABELS):
        assert int((weight @ pooled(work, label_words.words(label))).argmax()) == number


def test_the_head_favours_no_label_and_has_the_documented_size(work):
    head = work.start.only(("head",))
    (weight,) = (t for n, t in head.items() if n.endswith("weight"))
    (bias,) = (t for n, t in head.items() if n.endswith("bias"))
    vectors = torch.stack([pooled(work, label_words.words(label)) for label in LABELS])
    lengths = vectors.norm(dim=1)
    units = vectors / lengths[:, None]
    expected = label_words.LOGIT_SCALE * (units - units.mean(0)) / lengths.mean()
    assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-5) and weight.abs().max() > 0.01
    assert not bias.any()


def test_each_label_has_the_row_that_it_has_beside_others_of_its_length(work, monkeypatch):
    whole = label_words.head(work.model, work.task, LABELS)
    monkeypatch.setattr(work.task, "physical_batch", 1)
    one_by_one = label_words.head(work.model, work.task, LABELS)
    assert torch.allclose(whole, one_by_one, rtol=1e-4, atol=1e-5)
    assert int(whole.argmax()) == int(one_by_one.argmax())


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (("limit", "2"), "'2' has no words"),
        (("limit", "unheard"), "'unheard' has no words"),
        (("scam_limit", "scam-limit"), "'scam_limit' and 'scam-limit' have the same words"),
        (("limit scam", "unheard scam", "unknown scam"), "'unheard scam' and 'unknown scam'"),
    ],
)
def test_labels_without_words_of_their_own_are_refused_where_their_words_were_asked_for(
    tiny_config, labels, why
):
    with pytest.raises(InputError, match=f"adapter.head is labels, but .*{why}.*set it to zero"):
        trainable.load(tiny_config(**{"adapter.head": "labels"}), labels)


def test_by_default_one_label_without_words_leaves_the_whole_head_at_zero(
    tiny_config, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)
    words = ("limit", "scam", "identity", "cashback", "swipe")
    labels = (*(f"{one}_{other}" for one in words for other in words), "2")
    assert len(labels) >= MANY_CLASSES
    start = trainable.load(tiny_config(), labels).start
    assert not any(tensor.any() for tensor in start.only(("head",)).values())
    assert "starts at zero, since the label '2' has no words" in caplog.text


def test_a_base_that_fails_or_whose_states_are_tiny_gives_no_head(work, monkeypatch):
    base, real = base_model(work.model), base_model(work.model).pooled
    monkeypatch.setattr(base, "pooled", lambda *a, **k: 1e-4 * real(*a, **k))
    with pytest.raises(InputError, match="too small"):
        label_words.head(work.model, work.task, LABELS)

    def fail(*_, **__):
        raise RuntimeError("rows of at least\n8 tokens")

    monkeypatch.setattr(base, "pooled", fail)
    with pytest.raises(InputError, match="rows of at least 8 tokens"):
        label_words.head(work.model, work.task, LABELS)


def test_a_head_of_zeros_can_be_asked_for_and_nothing_else_of_the_start_differs(tiny_config, work):
    zero = trainable.load(tiny_config(**{"adapter.head": "zero"}), LABELS).start
    assert not any(tensor.any() for tensor in zero.only(("head",)).values())
    parts = ("A", "B")
    for name, tensor in zero.only(parts).items():
        assert torch.equal(work.start[name], tensor)


@pytest.mark.parametrize("classes", [MANY_CLASSES - 1, MANY_CLASSES])
def test_by_default_the_words_of_many_classes_are_read(tiny_config, classes):
    words = ("limit", "scam", "identity", "cashback", "swipe")
    pairs = [f"{one}_{other}" for one in words for other in words][:classes]
    start = trainable.load(tiny_config(), tuple(pairs)).start
    found = any(tensor.any() for tensor in start.only(("head",)).values())
    assert found is (classes == MANY_CLASSES)


def test_an_institution_knows_a_try_again_with_another_head(tiny_config):
    """The order carries the head, so that a ledger charged for one answers the other."""
    one, other = (tiny_config(**{"adapter.head": head}) for head in ("labels", "zero"))
    assert one.fingerprint(*UNRELEASED) == other.fingerprint(*UNRELEASED)
    assert one.fingerprint() != other.fingerprint()


def test_the_untrained_model_of_a_sweep_has_the_head_of_its_point():
    for head in ("labels", "zero"):
        config = sweep._in_arm("base", {}, {"adapter.head": head, "adapter.rank": 4})
        assert (config.adapter.head, config.adapter.rank) == (head, AdapterConfig().rank)
