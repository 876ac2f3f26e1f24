"""Institutions with equal orders train in shared passes."""

import dataclasses

import torch

from client import cohort
from client.institution import Institution
from fedlora.data import records
from fedlora.models import adapters, trainable
from tests.samples import train_order


def test_equal_orders_share_passes_and_each_gets_the_answer_that_it_gets_alone(
    tiny_config, tmp_path, monkeypatch
):
    parts: list[list[str]] = []
    answers: list[list[cohort.Outcome]] = []
    together = cohort.train_rounds
    monkeypatch.setattr(
        cohort,
        "train_rounds",
        lambda rounds: parts.append([one.name for one in rounds]) or together(rounds),
    )
    for place in ("together", "alone"):
        config = tiny_config(**{"run-dir": str(tmp_path / place)})
        federation = records.load(config)
        work = trainable.load(config, federation.labels)
        order = train_order(work, parts=adapters.PARTS)
        other = dataclasses.replace(order, participations=1)
        calls = [
            (Institution.locate(config, i), other if i == 3 else order)
            for i in range(len(federation.names))
        ]
        for institution, _ in calls:
            institution.open_ledger(create=True).close()
        groups = [calls] if place == "together" else [[call] for call in calls]
        answers.append(
            [
                answer
                for group in groups
                for answer in cohort.answer([who.play(asked) for who, asked in group])
            ]
        )
        assert not any(isinstance(answer, Exception) for answer in answers[-1]), answers[-1]
    first, second, third, fourth = federation.names
    assert parts[:2] == [[first, second, third], [fourth]]
    assert parts[2:] == [[first], [second], [third], [fourth]]
    for shared, alone in zip(*answers, strict=True):
        assert shared.institution == alone.institution
        for name, tensor in alone.adapter.items():
            assert torch.equal(shared.adapter[name], tensor), name
