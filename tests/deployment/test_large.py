"""Messages as large as those of an 8B model: 200 MB of adapter in float32."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel

from fedlora.models.adapters import AdapterState
from tests.deployment.conftest import NAMES, rehearsal

pytestmark = pytest.mark.slow

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
}
ALL_LINEAR = {"adapter.target-modules": json.dumps(["query", "key", "value", "dense"])}
PER_RANK = 4 * 6 * (4 * 2 * 1024 + 2 * (1024 + 4096))
"""Bytes of float32 that each rank adds on WIDE's linear layers."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, complaints):
    model = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_encoder, model)
    config = BertConfig.from_pretrained(tiny_encoder, trust_remote_code=False)
    config.update(WIDE)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(model)
    with rehearsal(tmp_path_factory.mktemp("large"), model, complaints) as made:
        for name in NAMES:
            made.settings(name, max_rank=480)
        made.up()
        yield made


def test_adapters_of_200_mb_pass_in_both_directions(federation):
    rank = 480
    values = {"training.local-steps": 1, "federation.timeout": 600.0}
    done = federation.submit("large", **ALL_LINEAR, **{"adapter.rank": rank}, **values)
    assert done["state"] == "completed"
    assert [record["updates"] for record in federation.rounds("large")] == [3, 3]
    adapter = AdapterState.open(federation.results("large") / "adapter")
    size = sum(4 * tensor.numel() for tensor in adapter.values())
    assert size >= rank * PER_RANK >= 200e6
