import dataclasses

import pytest
import torch

from fedlora import label_words, records, trainable
from fedlora.errors import InputError
from tests.fedlora.small_models import encoder_tokenizer, load


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("IncreaseDecreaseInAccountsPayable", "increase decrease in accounts payable"),
        ("Refund_not_showing_up", "refund not showing up"),
        ("credit-card / prepaid", "credit card prepaid"),
        ("USGaapTag", "us gaap tag"),
        ("Top5Banks", "top5 banks"),
        ("Größe_über", "größe über"),
        ("positive", "positive"),
        ("__", ""),
    ],
)
def test_words_of_a_label(label, said):
    assert label_words.words(label) == said


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("positive", "negative"), True),
        (("0", "1", "2"), False),
        (("positive", "-1"), False),
        (("card_lost", "card-lost"), False),
        (("größe", "Ωmega"), True),
    ],
)
def test_numbers_and_twins_have_no_words(labels, expected):
    assert label_words.has_words(labels) is expected


@pytest.fixture
def base(directories, no_tokenizer):
    made = load(directories / "bert")
    return dataclasses.replace(made, tokenizer=encoder_tokenizer())


def test_a_text_of_a_labels_own_words_is_given_that_label(base):
    labels = ("A_b", "C-d", "eF")
    label_words.start_head(base, labels)
    for number, text in enumerate(("a b", "c d", "e f")):
        made = base.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = base.model(made["input_ids"], made["attention_mask"]).logits[0]
        assert int(logits.argmax()) == number


def test_the_head_favours_no_label_and_has_the_documented_size(base):
    label_words.start_head(base, ("a_b", "c_d", "e_f"))
    weight, pooled = base.model.classifier.weight, []
    for text in ("a b", "c d", "e f"):
        made = base.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            pooled.append(base.model.pooled(made["input_ids"], made["attention_mask"])[0])
    lengths = torch.stack([one.norm() for one in pooled])
    units = torch.stack([one / one.norm() for one in pooled])
    expected = label_words.LOGIT_SCALE * (units - units.mean(0)) / lengths.mean()
    assert torch.allclose(weight, expected, atol=1e-6) and weight.abs().max() > 0
    assert torch.allclose(weight.sum(0), torch.zeros(weight.shape[1]), atol=1e-5)
    assert not base.model.classifier.bias.any()


def test_labels_without_words_leave_the_head_at_zero(base):
    label_words.start_head(base, ("0", "1", "2"))
    assert not base.model.classifier.weight.any()


@pytest.mark.parametrize("head", ["labels", "zero"])
def test_the_start_of_a_run_has_the_head_that_was_asked_for(tiny_config, head):
    config = tiny_config(**{"adapter.head": head})
    work = trainable.load(config, records.load(config).labels)
    found = work.start.only(("head",))
    weight = next(t for name, t in found.items() if name.endswith("weight"))
    assert bool(weight.any()) is (head == "labels")


def test_a_base_that_fails_on_a_label_says_which(base, monkeypatch):
    def fail(*_):
        raise RuntimeError("rows of at least\n8 tokens")

    monkeypatch.setattr(base.model, "pooled", fail)
    with pytest.raises(
        InputError, match=r"adapter.head is labels.*'A_b'.*at least 8 tokens.*set it to zero"
    ):
        label_words.start_head(base, ("A_b", "C-d"))
