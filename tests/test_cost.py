"""What a step costs is counted as it is: memory found on the meta device against a real step."""

import shutil

import pytest
import torch

from analysis.cost_room import CARD, CLAIMS, ROOM, largest_batch, read, write_tables
from liquiddiff import budget
from liquiddiff.config import BadInput, Model
from liquiddiff.memory import autocast, training_memory

MODEL, SHAPE, BATCH = Model("small", [8, 16], [1, 1]), (3, 16, 16), 4


def kept_by_autograd(precision=None, checkpointing=False):
    """Bytes that a real step keeps between forward and backward, by another way of counting: autograd's own hooks."""
    net, kept = budget.build(MODEL, SHAPE), {}
    net.checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    x = torch.randn(BATCH, *SHAPE).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            net(x, torch.rand(BATCH))
    return sum(size for size, _ in kept.values())


@pytest.mark.filterwarnings("ignore:.*dispatch")
def test_memory_on_the_meta_device_is_that_of_a_real_step():
    from liquiddiff.depthwise import literal

    with literal():
        real = kept_by_autograd()
        assert training_memory(MODEL, SHAPE, BATCH).saved == pytest.approx(real, rel=0.1)


def test_memory_grows_with_the_batch_and_shrinks_with_precision_and_checkpointing():
    full = training_memory(MODEL, SHAPE, BATCH)
    assert full.state == 16 * budget.meta_cost(MODEL, SHAPE).params
    assert full.state < full.state + full.saved < full.peak
    twice, half = training_memory(MODEL, SHAPE, 2 * BATCH), training_memory(MODEL, SHAPE, BATCH, "fp16")
    assert twice.saved == pytest.approx(2 * full.saved, rel=0.05)
    assert 0.35 < half.saved / full.saved < 0.65
    again = training_memory(MODEL, SHAPE, BATCH, "fp16", checkpointing=True)
    assert again.saved < 0.4 * half.saved and again.peak < half.peak
    with pytest.raises(BadInput, match="unknown precision 'fp8'"):
        training_memory(MODEL, SHAPE, BATCH, "fp8")


def test_the_largest_batch_is_on_the_line_through_two_counts():
    assert largest_batch(16, 2, 9, 8) == 15  # 1 at any batch, 1 an image
    assert largest_batch(1.9, 2, 9, 8) == largest_batch(0.5, 2, 9, 8) == 0
    one, eight, four = (training_memory(MODEL, SHAPE, n, "fp16").peak for n in (1, 8, 4))
    assert largest_batch(1.01 * four, one, eight, 8) == 4
    assert one > 1.1 * eight / 8


def test_every_size_has_its_peak_at_batch_1():
    for row in (rows := read(ROOM / "memory.csv")):
        one, peak, batch = (int(row[key]) for key in ("peak_bytes_at_1", "peak_bytes", "batch"))
        assert peak / batch < one < peak
        assert int(row["largest_batch_in_16_gb"]) == largest_batch(CARD, one, peak, batch)
    assert len(rows) == 4 * (1 + len(CLAIMS))


def test_the_rooms_tables_are_checked(tmp_path, capsys):
    for name in ("README.md", "results.csv", "memory.csv"):
        shutil.copy(ROOM / name, tmp_path)
    assert write_tables(tmp_path) == write_tables(tmp_path, check=True) == 0
    path = tmp_path / "memory.csv"
    path.write_text(path.read_text().replace("tiny,64,fp32", "tiny,65,fp32"))
    before = (tmp_path / "README.md").read_text()
    assert write_tables(tmp_path, check=True) == 1
    assert "not of today's results" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == before


def test_autocast_on_the_meta_device_leaves_functions_as_they_were():
    before = torch.nn.functional.linear
    with autocast(torch.float16):
        assert torch.nn.functional.linear is not before
    assert torch.nn.functional.linear is before
