"""State spaces along the raster sequence of an image: diagonal and fixed by FFT (ssm), or selective by a scan (mamba).

Shapes: B batch, C channels, H W space, L = H * W steps, M inner width, N states a channel, K scan directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff.config import Mixer
from liquiddiff.depthwise import DepthwiseConv2d
from liquiddiff.layers import Pointwise, Slot, to_image, to_tokens
from liquiddiff.precision import full, full_precision
from liquiddiff.selective_scan import selective_scan


class SSM(nn.Module):
    """1x1(SiLU(S(1x1(x)))), S a bidirectional diagonal state space: the operator of DiffuSSM (arXiv:2311.18257).

    S4D (arXiv:2206.11893): h_l = exp(dt A) h_{l-1} + (exp(dt A) - 1) / A u_l, y_l = 2 Re(c . h_l) + d u_l, complex
    diagonal A, once from each end with its own c, summed. It is linear and fixed, so it is one circular convolution.
    """

    states = 16  # complex; S4D's 64 real ones are 32 of these

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, _, _ = slot
        N = self.states
        self.expand = Pointwise(C, M)
        self.contract = Pointwise(M, C)
        self.log_dt = nn.Parameter(torch.empty(M))
        self.log_decay = nn.Parameter(torch.empty(M, N))  # Re A = -exp(log_decay) < 0: stable
        self.frequency = nn.Parameter(torch.empty(M, N))  # Im A
        self.c = nn.Parameter(torch.empty(2, M, N, 2))  # forward, backward; real, imaginary
        self.d = nn.Parameter(torch.empty(M))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """S4D-Lin (Eq. 9 there): A_n = -1/2 + i pi n; dt log-uniform in [1e-3, 1e-1]."""
        nn.init.uniform_(self.log_dt, math.log(1e-3), math.log(1e-1))
        nn.init.constant_(self.log_decay, math.log(0.5))
        nn.init.normal_(self.c, std=0.5**0.5)
        nn.init.normal_(self.d)
        with torch.no_grad():
            self.frequency.copy_(math.pi * torch.arange(self.states))

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """See the class."""
        H, W = x_BCHW.shape[2:]
        u_BLM = to_tokens(self.expand(x_BCHW))
        with full_precision(u_BLM):
            y_BLM = self.convolve(full(u_BLM))
        return self.contract(to_image(F.silu(y_BLM), H, W))

    def convolve(self, u_BLM: Tensor) -> Tensor:
        """S. The backward kernel lies at negative lags; both hold lag 0. Twice the length, so nothing wraps around."""
        L = u_BLM.shape[1]
        ahead_ML, back_ML = self.kernels(L)
        taps_Mn = F.pad(ahead_ML, (0, L)) + F.pad(back_ML, (0, L)).flip(1).roll(1, dims=1)
        spectrum = torch.fft.rfft(u_BLM, n=2 * L, dim=1) * torch.fft.rfft(taps_Mn, dim=1).T
        return torch.fft.irfft(spectrum, n=2 * L, dim=1)[:, :L] + self.d * u_BLM

    def kernels(self, L: int) -> Tensor:
        """2 Re sum_n c_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), (2, M, L); S4D's Eq. 4 and zero-order hold.

        With l = a + S b the powers are an outer product of two short rows: O(N sqrt L) memory a channel, not O(N L).
        """
        A_MN = torch.complex(-self.log_decay.exp(), self.frequency)
        power_MN = A_MN * self.log_dt.exp()[:, None]
        weight_2MN = 2 * torch.view_as_complex(self.c.contiguous()) * (power_MN.exp() - 1) / A_MN
        S = math.isqrt(L - 1) + 1
        steps = torch.arange(S, device=A_MN.device)
        fine_MNa = (power_MN[:, :, None] * steps).exp()
        coarse_2MNb = weight_2MN[..., None] * (power_MN[:, :, None] * S * steps[: math.ceil(L / S)]).exp()
        left = torch.cat([coarse_2MNb.real, -coarse_2MNb.imag], dim=2).transpose(2, 3)  # Re(p q) = Re Re - Im Im
        right = torch.cat([fine_MNa.real, fine_MNa.imag], dim=1)
        return (left @ right).flatten(2)[:, :, :L]

    def extra_macs(self, H: int, W: int) -> int:
        """Multiply-adds of an image that torch's counter misses, less those of the kernels, which serve a whole batch.

        A real FFT of length n is 2.5 n log2 n operations; then a complex product a frequency.
        """
        L, M = H * W, len(self.d)
        S = math.isqrt(L - 1) + 1
        ffts = 2 * 1.25 * 2 * L * math.log2(2 * L)
        return round(M * (ffts + 4 * (L + 1))) - 2 * M * 2 * self.states * S * math.ceil(L / S)


class Mamba(nn.Module):
    """1x1(SiLU(z) * mean over directions of S(u)), u = SiLU(DW3x3(1x1(x))), z = 1x1(x): the operator of USM.

    S is Mamba's selective scan (arXiv:2312.00752, Algorithm 2), h_l = exp(dt A) h_{l-1} + dt B_l u_l,
    y_l = C_l . h_l + D u_l, where dt, B, C depend on u_l. It is run along rows and columns from both ends (VMamba,
    arXiv:2401.10166), each direction with its own weights.
    """

    states, directions = 8, 4

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, _, _ = slot
        K, N, R = self.directions, self.states, max(1, C // 16)
        self.sizes = [R, N, N]
        self.expand = Pointwise(C, 2 * M)
        self.context = DepthwiseConv2d(M, 3)
        self.select = Pointwise(M, K * sum(self.sizes), bias=False)  # dt (rank R), B and C of each direction
        self.contract = Pointwise(M, C)
        self.dt_weight = nn.Parameter(torch.empty(K, R, M))
        self.dt_bias = nn.Parameter(torch.empty(K, M))
        self.log_A = nn.Parameter(torch.empty(K, M, N))
        self.D = nn.Parameter(torch.empty(K, M))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's: A = -(1 .. N), softplus(dt_bias) log-uniform in [1e-3, 1e-1], D = 1."""
        nn.init.uniform_(self.dt_weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        nn.init.uniform_(self.dt_bias, math.log(1e-3), math.log(1e-1))
        nn.init.ones_(self.D)
        with torch.no_grad():
            dt = self.dt_bias.exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1
            self.log_A.copy_(torch.arange(1, self.states + 1).log())

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """See the class."""
        H, W = x_BCHW.shape[2:]
        u_BMHW, z_BMHW = self.expand(x_BCHW).chunk(2, dim=1)
        u_BMHW = F.silu(self.context(u_BMHW))
        selected = self.select(u_BMHW).chunk(self.directions, dim=1)  # a 1x1 product: before the scan or after is one
        u_BKLM = torch.stack([along(k, u_BMHW) for k in range(self.directions)], dim=1)
        rank, B, C = torch.stack([along(k, s) for k, s in enumerate(selected)], dim=1).split(self.sizes, dim=3)
        with full_precision(u_BMHW):
            dt_BKLM = F.softplus(full(rank) @ self.dt_weight + self.dt_bias[:, None])
            y_BKLM = selective_scan(full(u_BKLM), dt_BKLM, -self.log_A.exp(), full(B), full(C), self.D)
        y_BMHW = sum(back(k, y_BKLM[:, k], H, W) for k in range(self.directions)) / self.directions
        return self.contract(y_BMHW * F.silu(z_BMHW))

    def extra_macs(self, H: int, W: int) -> int:
        """Multiply-adds of the scan that torch's counter misses: dt A, (dt u) B and the recurrence; and D u."""
        _, M, N = self.log_A.shape
        return H * W * self.directions * M * (3 * N + 1)


def along(k: int, x_BMHW: Tensor) -> Tensor:
    """The image as the sequence of direction k: rows, rows reversed, columns, columns reversed; (B, L, M)."""
    sequence = to_tokens(x_BMHW if k < 2 else x_BMHW.transpose(2, 3))
    return sequence.flip(1) if k % 2 else sequence


def back(k: int, y_BLM: Tensor, H: int, W: int) -> Tensor:
    """The inverse of `along`."""
    sequence = y_BLM.flip(1) if k % 2 else y_BLM
    return to_image(sequence, H, W) if k < 2 else to_image(sequence, W, H).transpose(2, 3)
