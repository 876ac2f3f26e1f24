import torch

from fedlora.models.adapters import AdapterState
from strategies import server_optimizer

W = "w.lora_A.weight"


def _run(kind, deltas, lr=0.1):
    state, moments = AdapterState({W: torch.zeros(2)}), {}
    for delta in deltas:
        aggregated = AdapterState({W: state[W] + torch.tensor(delta)})
        state, moments = server_optimizer.step(kind, lr, state, aggregated, moments)
    return state[W]


def test_none_moves_by_the_learning_rate_times_the_update():
    torch.testing.assert_close(_run("none", [[1.0, -2.0]]), torch.tensor([0.1, -0.2]))


def test_adam_is_torchs_adam_on_the_negated_update():
    deltas = [[1.0, -2.0], [0.5, 0.1], [-0.3, 0.7]]
    p = torch.nn.Parameter(torch.zeros(2))
    reference = torch.optim.Adam(
        [p],
        lr=0.1,
        betas=(server_optimizer.BETA1, server_optimizer.BETA2),
        eps=server_optimizer.TAU,
    )
    for delta in deltas:
        p.grad = -torch.tensor(delta)
        reference.step()
    torch.testing.assert_close(_run("adam", deltas), p.detach())


def test_momentum_yogi_and_adagrad_by_hand():
    b1, b2 = server_optimizer.BETA1, server_optimizer.BETA2
    m1 = (1 - b1) * 1.0
    m2 = b1 * m1 + (1 - b1) * 3.0
    torch.testing.assert_close(
        _run("momentum", [[1.0, 1.0], [3.0, 3.0]])[0].item(),
        0.1 * (m1 / (1 - b1) + m2 / (1 - b1**2)),
        rtol=1e-5,
        atol=0,
    )
    v1 = (1 - b2) * 1.0  # as in the paper, without a correction
    v2 = v1 + (1 - b2) * 9.0
    expected = 0.1 * m1 / v1**0.5 + 0.1 * m2 / v2**0.5
    torch.testing.assert_close(
        _run("yogi", [[1.0, 1.0], [3.0, 3.0]])[0].item(), expected, rtol=1e-5, atol=0
    )
    expected = 0.1 * 1.0 / 1.0 + 0.1 * (m2 / (1 - b1**2)) / 10.0**0.5
    torch.testing.assert_close(
        _run("adagrad", [[1.0, 1.0], [3.0, 3.0]])[0].item(), expected, rtol=1e-5, atol=0
    )
