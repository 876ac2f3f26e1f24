"""The models of an institution at home: which records choose, and what is kept and said of them."""

import pytest
import torch
from peft import PeftModel

from client import home, measurement
from client.home import WEIGHTS, mixed
from client.institution import Institution
from fedlora.data import records
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from fedlora.wire.messages import EvaluateOrder

SMALL = {"home.method": "interpolate", "home.steps": 8}


def moved(state, seed):
    """An adapter whose every value is away from its start."""
    draw = torch.Generator().manual_seed(seed)
    return AdapterState(
        {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in state.items()}
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def banks(tiny_config):
    """Four banks after a run that released a random adapter, and the order to compare."""

    def make(**values):
        config = tiny_config(**(SMALL | values))
        work = trainable.load(config, records.load(config).labels)
        order = EvaluateOrder(run="a1", round=1, save=True, adapter=moved(work.start, 5))
        return [Institution.locate(config, i) for i in range(4)], order, work, config

    return make


def train(institution, order, work, *, steps=8):
    source = RandomSource.seeded("home", 1, institution.name)
    shared = measurement.released(institution, order)
    return home.train(work, institution.records(), shared, source, steps=steps, physical_batch=64)


@pytest.mark.parametrize(
    ("copies", "held_back"),
    [([1] * 20, 4), ([2] * 10, 4), ([90, *[1] * 10], 2), ([3] * 4, 0), ([20], 0)],
)
def test_copies_of_a_record_are_held_back_together_or_not_at_all(copies, held_back):
    ids = [[kind] for kind, count in enumerate(copies) for _ in range(count)]
    rows = shard_of(Encoded(ids=ids, targets=[0] * len(ids), truncated=[False] * len(ids)))
    parts = home.split(rows, RandomSource.seeded("copies", 1))
    texts = [{int(part.row(i)[0]) for i in range(len(part))} for part in parts]
    assert texts[0].isdisjoint(texts[1]) and texts[0] | texts[1] == set(range(len(copies)))
    assert sum(map(len, parts)) == len(ids)
    assert len(parts[1]) == held_back <= round(home.HELD_BACK * len(ids))


def test_a_mixture_is_a_weighted_mean_of_all_but_the_residual():
    names = ("l.lora_A.weight", "l.residual_A.weight", "classifier.weight")
    a = AdapterState({name: torch.full((2, 2), 1.0) for name in names})
    b = AdapterState({name: torch.full((2, 2), 3.0) for name in names})
    assert same(mixed(a, b, 0.0), a) and same(mixed(a, b, 1.0), b)
    found = mixed(a, b, 0.25)
    for name in names:
        assert float(found[name][0, 0]) == (1.0 if "residual" in name else 1.5)


@pytest.mark.parametrize("best", range(4))
def test_the_candidate_with_the_fewest_errors_on_records_held_back_is_taken(
    banks, monkeypatch, best
):
    institutions, order, work, _ = banks()
    asked, shards = [], []

    def errors(self, adapter, shard):
        asked.append(adapter)
        shards.append(shard)
        return float(len(asked) - 1 != best)

    monkeypatch.setattr(home._Trainer, "errors", errors)
    monkeypatch.setattr(home, "MIN_HELD_BACK", 4)
    found = train(institutions[0], order, work)
    assert len(asked) == 1 + len(WEIGHTS) and found.held_back == len(shards[0]) >= 4
    assert found.keeps_alone == (best == 0) and found.weight == (0.0, *WEIGHTS)[best]
    assert same(found.own, found.alone) == (best == 0)


def test_trials_train_on_no_record_that_is_held_back_and_the_models_on_all(banks, monkeypatch):
    institutions, order, work, _ = banks()
    trained, measured, plain = [], [], home._Trainer.train

    def seen(self, shard, start, source):
        trained.append((len(shard), {r.tobytes() for r in shard.records}))
        return plain(self, shard, start, source)

    def errors(self, adapter, shard):
        measured.append({r.tobytes() for r in shard.records})
        return 1.0 if len(measured) == 1 else 0.5

    monkeypatch.setattr(home._Trainer, "train", seen)
    monkeypatch.setattr(home._Trainer, "errors", errors)
    monkeypatch.setattr(home, "MIN_HELD_BACK", 4)
    train(institutions[0], order, work)
    everything = len(institutions[0].records())
    (fit, some), (fit_again, _), (whole, _), (whole_again, _) = trained
    assert fit == fit_again < everything == whole == whole_again
    assert all(some.isdisjoint(held) for held in measured)


def test_the_own_adapter_opens_with_peft_and_predicts_what_was_reported(banks):
    institutions, order, work, config = banks()
    one = institutions[0]
    metrics = measurement.compare_at_home(one, measurement.released(one, order)).metrics
    base = models.load_base(
        config.model.name,
        dtype="fp32",
        quantization="none",
        task="classification",
        num_labels=len(work.labels),
    )
    opened = PeftModel.from_pretrained(base.model, one.directory / "own", trust_remote_code=False)
    shard = records.load(config).held_out(0)
    batch = work.task.collate(shard, range(len(shard)))
    with torch.no_grad():
        logits = opened.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits
    assert logits.argmax(1).tolist() == metrics["own"]
    assert "must not leave" in (one.directory / "own" / "README.md").read_text()
    order.adapter.load_into(work.model)
    said, _ = work.task.predict(work.model, shard, work.labels)
    assert [work.labels.index(label) for label in said] == metrics["shared"]
