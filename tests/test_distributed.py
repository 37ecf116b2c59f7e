"""SyncBatchNorm and DDP over gloo processes against one process on the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resnet_fused

SHARES = {2: (3, 5), 3: (2, 4, 2)}  # images of each rank: uneven


def small_model(bn=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = [1, 1, 1, 1]
    return resnet_fused.ResNet(resnet_fused.BasicBlock, layers, num_classes=5, norm_layer=bn, zero_init_residual=True)


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3, 33, 33), torch.arange(8) % 5


def three_steps(model, x, target, world=1, total=8):
    """State after three SGD steps on the mean loss over all processes' images.

    Gradients are summed by hand: DistributedDataParallel itself refuses SyncBatchNorm on the CPU.
    """
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / total
        loss.backward()
        for p in model.parameters() if world > 1 else ():
            dist.all_reduce(p.grad)
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank, world, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def work(rank, world, port, backend, recompute, folder):
    join(rank, world, port)
    resnet_fused.set_backend(backend)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_model()).train()
    model.set_recompute(recompute)
    begin = sum(SHARES[world][:rank])
    x, target = (t[begin : begin + SHARES[world][rank]] for t in batch())
    state = three_steps(model, x, target, world)
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "world, backend, recompute",
    [
        (2, "eager", None),
        (3, "eager", "blocks"),
        (2, "triton", None),
        (3, "triton", None),
        (2, "triton", "activations"),
    ],
)
def test_processes_match_one_on_the_whole_batch(world, backend, recompute, tmp_path):
    mp.spawn(work, (world, free_port(), backend, recompute, str(tmp_path)), world)
    expected = three_steps(small_model().train(), *batch())
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for key, value in expected.items():
        for state in states:
            assert torch.equal(state[key], states[0][key]), f"ranks differ in {key}"
        scale = value.float().abs().max().item()
        torch.testing.assert_close(
            states[0][key], value, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert states[0]["bn1.num_batches_tracked"] == 3


def work_ddp(rank, world, port, folder):
    join(rank, world, port)
    states = []
    for backend in ("eager", "triton"):
        resnet_fused.set_backend(backend)
        model = DistributedDataParallel(small_model().train())
        x, target = (t[4 * rank :][:4] for t in batch())
        states.append(three_steps(model, x, target, total=4))
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_on_the_fused_backend_follows_eager(tmp_path):
    mp.spawn(work_ddp, (2, free_port(), str(tmp_path)), 2)
    eager, fused = torch.load(tmp_path / "0.pt")
    for key, value in eager.items():
        scale = value.float().abs().max().item()
        torch.testing.assert_close(fused[key], value, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_sync_batch_norm_alone_is_batch_norm_on_the_cpu():
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(small_model()).train()
    expected = three_steps(small_model().train(), *batch())
    for key, value in three_steps(sync, *batch()).items():
        assert torch.equal(value, expected[key]), key
