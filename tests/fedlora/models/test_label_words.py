import pytest
import torch

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
