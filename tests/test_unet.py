"""The network: the seed's sizes, its limits in t, and weights that one arm cannot change in another."""

import pytest
import torch
from conftest import awake

from liquiddiff import LiquidDiffusionUNet, budget, unet
from liquiddiff.block import AdaLN, SpatialMix
from liquiddiff.config import SIZES, Mixer, Model
from liquiddiff.layers import upsampled
from liquiddiff.relaxation import LAWS
from liquiddiff.seeding import initialise
from liquiddiff.solvers import integrate

CLAIMED = {"tiny": 8e6, "small": 25e6, "base": 65e6, "large": 120e6}


def net_of(**parts):
    net = LiquidDiffusionUNet(Model("test", [8, 16], [1, 1], **parts), in_channels=1, resolution=8)
    initialise(net, 0)
    return net


@pytest.mark.parametrize("size", CLAIMED)
def test_parameters_are_within_15_percent_of_the_seed_s(size):
    cost = budget.meta_cost(Model(size, **SIZES[size]), (3, 64, 64))
    assert cost.params == pytest.approx(CLAIMED[size], rel=0.15)


def test_macs_are_multiply_adds():
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, t):
            return self.conv(x)

    assert budget.cost(Net(), (4, 8, 8)).macs == 8 * 8 * 4 * 6 * 9


@pytest.mark.parametrize("channels", [8, 96, 136, 144, 168])
def test_any_multiple_of_8_channels_has_groups(channels):
    with torch.device("meta"):
        net = LiquidDiffusionUNet(Model(channels=[channels], blocks=[1]), in_channels=1)
    assert net(torch.empty(1, 1, 4, 4, device="meta"), torch.empty(1, device="meta")).shape == (1, 1, 4, 4)


def test_untrained_network_predicts_zero():
    v = net_of()(torch.randn(2, 1, 8, 8), torch.rand(2))
    assert v.shape == (2, 1, 8, 8)
    assert not v.any()


def test_any_size_that_the_stride_divides():
    net = awake(net_of())
    assert net(torch.randn(1, 1, 10, 6), torch.rand(1)).shape == (1, 1, 10, 6)
    with pytest.raises(ValueError, match="divisible by 2"):
        net(torch.randn(1, 1, 9, 8), torch.rand(1))


@torch.no_grad()
@pytest.mark.parametrize("law", LAWS)
def test_samples_do_not_see_their_batch(law):
    # The published CfC code broadcasts its times over the wrong axis, so that one sample changes another.
    net = awake(net_of(relaxation=law)).eval()
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    torch.testing.assert_close(net(x, t)[2:3], net(x[2:3], t[2:3]), rtol=1e-4, atol=1e-5)


def test_liquid_relaxation_at_both_ends_of_t():
    law, temb = LAWS["liquid"](4), torch.randn(2, 8)
    x, y = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(law(x, y, torch.zeros(2), temb), x)  # clean: the input passes
    torch.testing.assert_close(law(x, y, torch.ones(2), temb), (x + y) / 2)  # rho = 0: alpha(1) = 0.5
    torch.nn.init.constant_(law.rho, 50.0)
    torch.testing.assert_close(law(x, y, torch.ones(2), temb), y)  # fast decay: the mixer decides


def test_branch_gradient_vanishes_with_t_only_under_liquid_relaxation():
    def share(name):
        law, y = LAWS[name](4), torch.randn(1, 4, 3, 3, requires_grad=True)
        law(torch.randn(1, 4, 3, 3), y, torch.full((1,), 1e-3), torch.randn(1, 8)).sum().backward()
        return y.grad.mean().item()

    assert share("liquid") == pytest.approx(0.693e-3, rel=1e-2)  # 1 - 2^-t
    assert share("none") == 1
    assert share("constant") == pytest.approx(0.5)
    assert share("reversed") == pytest.approx(0.5, rel=1e-2)


def test_shared_law_has_one_decay_a_level():
    names = [n for n, _ in net_of(relaxation="shared").named_parameters() if "rho" in n]
    assert len(names) == 2
    assert len([n for n, _ in net_of(relaxation="liquid").named_parameters() if "rho" in n]) == 6


def test_adaln_starts_as_layer_norm():
    norm, x = AdaLN(8, 4), torch.randn(2, 8, 5, 5)
    expected = torch.nn.LayerNorm(8, elementwise_affine=False)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x, norm.rows(torch.randn(2, 4)))[0], expected)


def test_merged_spatial_mix_is_the_sum_of_its_scales():
    mix, temb = SpatialMix(32, 4, [3, 5, 7], pool=True, concat=False), torch.randn(2, 4)
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    rows = mix.norm.rows(temb)
    n, _ = mix.norm(x, rows)
    literal = sum(scale(n) for scale in mix.scales) + mix.pool(n.mean((2, 3)))[:, :, None, None]
    expected = x + mix.out(torch.nn.functional.silu(literal))
    torch.testing.assert_close(mix(x, rows), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # by another kernel
        torch.testing.assert_close(mix(x, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [{"relaxation": "none"}, {"mixer": Mixer("conv")}, {"mixer": Mixer(gate="none")}])
def test_shared_tensors_start_equal_in_every_arm(parts):
    base, arm = dict(net_of().named_parameters()), dict(net_of(**parts).named_parameters())
    shared = [name for name in base if ".mixer." not in name and "rho" not in name]
    assert shared == [name for name in arm if ".mixer." not in name and "rho" not in name]
    assert all(torch.equal(base[name], arm[name]) for name in shared)


def test_initialisation_depends_on_the_seed_and_nothing_else():
    torch.manual_seed(5)
    one = net_of()
    torch.manual_seed(6)
    two = net_of()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    initialise(two, 1)
    assert not torch.equal(one.stem[0].weight, two.stem[0].weight)


def test_checkpointing_changes_memory_and_nothing_else():
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    grads = []
    for checkpointing in (False, True):
        net = awake(net_of())
        net.checkpointing = checkpointing
        net(x, t).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):  # sums of gradients are taken in another order
        assert ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() <= 1e-5


def in_bfloat16(net, x, t):
    """Output, gradients, and bytes kept between forward and backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.nbytes) or saved, lambda saved: saved
    ):
        with torch.autocast("cpu", torch.bfloat16):
            v = net(x, t)
    v.float().square().sum().backward()
    return [v.detach(), *(p.grad for p in net.parameters()), sum(kept)]


@pytest.mark.parametrize("parts", [{}, {"mixer": Mixer("conv")}, {"relaxation": "residual", "mix_kernels": []}])
def test_large_images_in_mixed_precision_keep_less_and_train_the_same(monkeypatch, parts):
    x, t, found = torch.randn(3, 1, 8, 8), torch.rand(3), []
    for large in (10**9, 1):
        monkeypatch.setattr(unet, "LARGE", large)
        monkeypatch.setattr(unet, "PART", 2 * 32 * 64)  # two images at once, then one
        found.append(in_bfloat16(awake(net_of(**parts)), x, t))
    assert found[1].pop() < 0.5 * found[0].pop()
    for a, b in zip(*found, strict=True):  # sums over the batch are rounded to bfloat16, or not
        assert ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() < 3e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_t_may_serve_all_images(checkpointing, monkeypatch):
    monkeypatch.setattr(unet, "PART", 1)  # image by image
    net, x, t = awake(net_of()), torch.randn(3, 1, 8, 8), torch.rand(1)
    expected = net(x, t.repeat(3))
    net.checkpointing = checkpointing
    for one in (t, t.expand(3)):
        torch.testing.assert_close(net(x, one), expected, rtol=1e-4, atol=1e-5)


def test_each_image_s_t_has_its_gradient_though_they_are_one():
    net, x, t = awake(net_of()), torch.randn(3, 1, 8, 8), torch.rand(1)
    found = []
    for every in (t.expand(3), t.repeat(3)):
        every.requires_grad_()
        found.append(torch.autograd.grad(net(x, every).square().sum(), every)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().min() > 0


@torch.no_grad()
def test_images_of_one_channel_reach_the_blocks_channels_last():
    net, layouts = net_of(), []  # weights as a fresh network has them
    see = lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))  # noqa: E731
    for block in (net.encoder[0][0], net.encoder[1][0], net.decoder[0][0]):
        block.register_forward_pre_hook(see)
    net(torch.randn(3, 1, 8, 8), torch.rand(3))
    assert layouts == [True] * 3


@torch.no_grad()
def test_a_sampling_embeds_its_one_noise_level_once():
    net, seen = awake(net_of()), []
    net.time.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    integrate(net, torch.randn(3, 1, 8, 8), 4, "heun")
    assert seen == [1] * 4


@torch.no_grad()
def test_networks_can_be_mapped_over():
    net, x, t = awake(net_of()), torch.randn(3, 1, 8, 8), torch.rand(3)
    mapped = torch.func.vmap(lambda x, t: net(x[None], t[None])[0])(x, t)
    torch.testing.assert_close(mapped, net(x, t), rtol=1e-4, atol=1e-5)


def test_upsampling_is_the_same_mapped_and_differentiated_by_torch_func():
    x, w, b = torch.randn(3, 2, 4, 4), torch.randn(5, 2, 3, 3), torch.randn(5)
    one = torch.func.vmap(lambda x: upsampled(x[None], w, b)[0])
    torch.testing.assert_close(one(x), upsampled(x, w, b), rtol=1e-4, atol=1e-5)
    plain = w.clone().requires_grad_()
    upsampled(x, plain, b).square().sum().backward()
    by_func = torch.func.grad(lambda w: upsampled(x, w, b).square().sum())(w)
    torch.testing.assert_close(by_func, plain.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("parts", [{}, {"relaxation": "shared"}, {"mixer": Mixer("conv", match="both")}])
def test_published_weights_come_back(tmp_path, parts):
    model = Model("test", [8, 16], [1, 1], **parts)
    net = awake(budget.build(model, (1, 8, 8))).eval()
    net.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    back = LiquidDiffusionUNet.from_pretrained(tmp_path).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t), back(x, t))
