"""Fixtures for several files of tests."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fedlora.models import models
from tests.fedlora.small_models import CONFIGS


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """A folder with a small random model for each family."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for family, config in CONFIGS.items():
        factory = AutoModel if family == "bert" else AutoModelForCausalLM
        factory.from_config(config, trust_remote_code=False).save_pretrained(root / family)
    return root


@pytest.fixture
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: None)
