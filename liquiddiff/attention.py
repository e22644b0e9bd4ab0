"""Self-attention over all positions of a level, exact and linear: what the liquid mixer claims to replace.

Attention is blind to place, so fixed 2-D sinusoids are added to its input; time reaches it through the block's AdaLN.
Shapes: B batch, C channels, H W space, N = H * W positions, M inner width, E = M / heads width of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff.config import Mixer
from liquiddiff.layers import Pointwise, Slot, positions, to_image, to_tokens
from liquiddiff.precision import full, full_precision

HEAD = 32  # wished width of a head


class Attention(nn.Module):
    """Multi-head softmax attention: 1x1(softmax(q k^T / sqrt(E)) v), q, k, v = 1x1(x + position).

    M need not divide by the number of heads: the last head is then padded with zeros, which change no score.
    """

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, _, _ = slot
        self.heads = max(1, round(M / HEAD))
        self.qkv = Pointwise(C, 3 * M)
        self.contract = Pointwise(M, C)

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """See the class."""
        _, C, H, W = x_BCHW.shape
        q_BNM, k_BNM, v_BNM = to_tokens(self.qkv(x_BCHW + positions(C, H, W, x_BCHW))).chunk(3, dim=2)
        y_BNM = self.attend(q_BNM, k_BNM, v_BNM)
        return self.contract(to_image(y_BNM, H, W))

    def attend(self, q_BNM: Tensor, k_BNM: Tensor, v_BNM: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(E)) v in each head (arXiv:1706.03762, Eq. 1)."""
        y_BhNE = F.scaled_dot_product_attention(self.split(q_BNM), self.split(k_BNM), self.split(v_BNM))
        return self.join(y_BhNE, v_BNM.shape[2])

    def split(self, z_BNM: Tensor) -> Tensor:
        """(B, N, M) -> (B, heads, N, E)."""
        padding = -z_BNM.shape[2] % self.heads
        return F.pad(z_BNM, (0, padding)).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def join(self, y_BhNE: Tensor, M: int) -> Tensor:
        """(B, heads, N, E) -> (B, N, M)."""
        return y_BhNE.transpose(1, 2).flatten(2)[:, :, :M]


class LinearAttention(Attention):
    """The same with the kernel phi(q) . phi(k), phi = elu + 1, in place of exp: O(N) (arXiv:2006.16236, Eq. 5-7)."""

    def attend(self, q_BNM: Tensor, k_BNM: Tensor, v_BNM: Tensor) -> Tensor:
        """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), in float32: the sums run over all positions."""
        with full_precision(q_BNM):
            # phi before the heads are padded: phi(0) = 1 would count
            q, k, v = (self.split(z) for z in (F.elu(full(q_BNM)) + 1, F.elu(full(k_BNM)) + 1, full(v_BNM)))
            memory_BhEE = k.transpose(2, 3) @ v / k.shape[2]
            total_BhE1 = k.mean(dim=2)[..., None]
            return self.join((q @ memory_BhEE) / (q @ total_BhE1), v_BNM.shape[2])
