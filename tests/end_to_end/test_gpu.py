"""The same runs on a CUDA device: ``pytest -m gpu``."""

from pathlib import Path

import pytest
import torch

from fedlora.data import records
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh():
    trainable.forget()
    yield
    trainable.forget()


def test_without_dp_a_gpu_gives_the_cpus_adapter_up_to_rounding(
    tiny_config, simulate_run, tmp_path
):
    made = []
    for gpus in (0.0, 1.0):
        config = tiny_config(
            **{
                "privacy.epsilon": float("inf"),
                "federation.server-optimizer": "none",
                "federation.server-learning-rate": 1.0,
                "engine.gpus": gpus,
                "run-dir": str(tmp_path / str(gpus)),
            }
        )
        simulate_run(config)
        made.append(AdapterState.open(Path(config.run_dir) / "adapter"))
        trainable.forget()
    for name in made[0]:
        torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_method_trains_under_dp_on_a_gpu(tiny_config, simulate_run, method, quantization):
    config = tiny_config(
        **{"engine.gpus": 1.0, "adapter.method": method, "model.quantization": quantization}
    )
    result = simulate_run(config)
    assert 0 < result["epsilon_max"] <= 8.0
    work = trainable.load(config, records.load(config).labels)
    assert next(iter(work.parameters().values())).device.type == "cuda"
