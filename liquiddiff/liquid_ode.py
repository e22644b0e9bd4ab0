"""The liquid ODE that CfC approximates in closed form, solved: by LTC's own fused solver, or adaptively.

    dx/ds = -(1/tau + f(x, I)) x + f(x, I) A        (LTC, arXiv:2006.04439, Eq. 1)

over s in [0, |t|]: the noise level is the elapsed time, as in the seed's bridge, so that as t -> 0 the state passes as
it began. Shapes: B batch, C channels, M hidden width (the state's), H W space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff.config import Mixer
from liquiddiff.depthwise import DepthwiseConv2d
from liquiddiff.layers import Pointwise, Slot, peer
from liquiddiff.precision import full, full_precision


class LTC(nn.Module):
    """Liquid time-constant cell over an image, all positions at once.

    x(0) = 1x1(DW7x7(in)); f = sigma(1x1(DW7x7(in)) + 1x1(x)), so f > 0 and the state is bounded; tau > 0 and A are
    learned per channel; y = 1x1(x(|t|)).
    """

    unfolds = 6  # of the solver, as published

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, _, _ = slot
        self.context = DepthwiseConv2d(C, 7)
        self.start = Pointwise(C, M)
        self.drive = Pointwise(C, M)
        self.recur = Pointwise(M, M, bias=False)
        self.contract = Pointwise(M, C)
        self.log_tau = nn.Parameter(torch.empty(M))
        self.A = nn.Parameter(torch.empty(M))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tau = 1; A uniform in [-1, 1], the reversal potentials of excitation and inhibition."""
        nn.init.constant_(self.log_tau, 0.5413)  # softplus^-1(1)
        nn.init.uniform_(self.A, -1, 1)

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """See the class."""
        c = self.context(x_BCHW)
        x_BMHW, drive_BMHW = self.start(c), self.drive(c)
        return self.contract(self.solve(x_BMHW, drive_BMHW, t_B.abs()[:, None, None, None]))

    def constants(self) -> tuple[Tensor, Tensor]:
        """1/tau and A, (M, 1, 1)."""
        return 1 / F.softplus(self.log_tau)[:, None, None], self.A[:, None, None]

    def f(self, x_BMHW: Tensor, drive_BMHW: Tensor) -> Tensor:
        """The synapses' conductance, in (0, 1)."""
        return torch.sigmoid(drive_BMHW + self.recur(x_BMHW))

    def field(self, x_BMHW: Tensor, drive_BMHW: Tensor) -> Tensor:
        """dx/ds, Eq. 1."""
        rate, A = self.constants()
        f = self.f(x_BMHW, drive_BMHW)
        return f * A - (rate + f) * x_BMHW

    def solve(self, x_BMHW: Tensor, drive_BMHW: Tensor, elapsed_B111: Tensor) -> Tensor:
        """The state after the elapsed time, by the fused semi-implicit Euler solver: stable at any step."""
        rate, A = self.constants()
        step = elapsed_B111 / self.unfolds
        for _ in range(self.unfolds):
            f = self.f(x_BMHW, drive_BMHW)
            x_BMHW = (x_BMHW + step * f * A) / (1 + step * (rate + f))  # Eq. 3
        return x_BMHW


class ODE(LTC):
    """The same field through torchdiffeq's adaptive Dormand-Prince, at a tight tolerance, in float32.

    The solver's steps depend on the whole batch, so a sample's result depends on its companions, but only within the
    tolerance, which the worst sample has to meet. Gradients go through the solver's own steps, the exact gradient of
    what was computed. `evaluations` counts those of the last call; multiply-adds on the meta device are those of
    `nominal` evaluations, what an untrained network needs.
    """

    rtol, atol = 1e-4, 1e-5
    nominal = 19
    evaluations = 0

    def solve(self, x_BMHW: Tensor, drive_BMHW: Tensor, elapsed_B111: Tensor) -> Tensor:
        """The state after the elapsed time. Raises BadInput where torchdiffeq is missing."""
        x, drive, elapsed = full(x_BMHW), full(drive_BMHW), full(elapsed_B111)
        self.evaluations = 0

        def field(s: Tensor, x_BHWM: Tensor) -> Tensor:
            """d/ds over s in [0, 1], which every sample reaches after its own |t|; nothing is divided by t."""
            self.evaluations += 1
            return (elapsed * self.field(x_BHWM.permute(0, 3, 1, 2), drive)).permute(0, 2, 3, 1)

        with full_precision(x):
            if x.is_meta:  # no values, so no error to control: as many products as a solution takes
                return torch.stack([self.recur(x) for _ in range(self.nominal)]).sum(0)
            options = {"norm": worst_sample, "first_step": 0.25}
            ends = torch.tensor([0.0, 1.0], device=x.device)
            odeint = peer("torchdiffeq").odeint
            # In the order of memory, for torchdiffeq's own tensors are in that of the dimensions.
            states = odeint(
                field, x.permute(0, 2, 3, 1), ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options
            )
            return states[-1].permute(0, 3, 1, 2)


def worst_sample(error_BHWM: Tensor) -> Tensor:
    """The largest root mean square of a sample: a large batch must not hide one that is inexact."""
    return error_BHWM.flatten(1).square().mean(1).amax().sqrt()
