"""Schedule-free Signum against its update rule, step by step."""

import pytest
import torch
from torch import nn

from resa_hf.sae.signum import ScheduleFreeSignum


def test_signum_equals_a_loop_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = ScheduleFreeSignum([parameter], lr=0.1)
    z, iterates, y = start.clone(), [], start.clone()
    for _ in range(20):
        optimizer.zero_grad()
        (parameter - target)[1:].pow(2).sum().backward()
        optimizer.step()
        z = torch.cat([z[:1], z[1:] - 0.1 * (y - target)[1:].sign()])  # the first row has no gradient and stays
        iterates.append(z)
        average = torch.stack(iterates).mean(0)
        y = 0.05 * z + 0.95 * average
        torch.testing.assert_close(parameter.detach(), y, rtol=1e-12, atol=1e-12)
    optimizer.use_average()
    torch.testing.assert_close(parameter.detach(), average, rtol=1e-12, atol=1e-12)
    assert torch.equal(parameter[0], start[0])
    optimizer.use_training_point()
    torch.testing.assert_close(parameter.detach(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lr", "momentum"), [(-1.0, 0.9), (0.1, 1.0), (0.1, -0.1)])
def test_signum_refuses_what_makes_no_sense(lr: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="lr|momentum"):
        ScheduleFreeSignum([nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)
