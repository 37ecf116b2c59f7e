"""Over gloo processes: SyncBatchNorm against one process on the whole batch; DDP and FSDP2 against eager."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import resnet_fused

SHARES = {2: (3, 5), 3: (3, 5, 0)}  # images of each rank: uneven, down to none


def small_model(**kwargs):
    torch.manual_seed(0)
    return resnet_fused.ResNet(
        resnet_fused.BasicBlock, [1, 1, 1, 1], num_classes=5, zero_init_residual=True, **kwargs
    ).train()


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
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_model())
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
        (3, "triton", None),
        (2, "triton", "activations"),
    ],
)
def test_processes_match_one_on_the_whole_batch(world, backend, recompute, tmp_path):
    mp.spawn(work, (world, free_port(), backend, recompute, str(tmp_path)), world)
    expected = three_steps(small_model(), *batch())
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for key, value in expected.items():
        for state in states:
            assert torch.equal(state[key], states[0][key]), f"ranks differ in {key}"
        scale = value.float().abs().max().item()
        torch.testing.assert_close(
            states[0][key], value, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert states[0]["bn1.num_batches_tracked"] == 3


def fsdp2():
    """Sharded by block."""
    model = small_model()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage[0])
    return fully_shard(model)


WRAPPERS = {"ddp": lambda: DistributedDataParallel(small_model()), "fsdp2": fsdp2}


def work_wrapped(rank, world, port, wrapper, folder):
    join(rank, world, port)
    states = []
    for backend in ("eager", "triton"):
        resnet_fused.set_backend(backend)
        model = WRAPPERS[wrapper]()
        x, target = (t[4 * rank :][:4] for t in batch())
        state = three_steps(model, x, target, total=4)
        states.append({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()})
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_on_the_fused_backend_follow_eager(wrapper, tmp_path):
    mp.spawn(work_wrapped, (2, free_port(), wrapper, str(tmp_path)), 2)
    eager, fused = torch.load(tmp_path / "0.pt")
    for key, value in eager.items():
        scale = value.float().abs().max().item()
        torch.testing.assert_close(fused[key], value, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_sync_batch_norm_alone_is_batch_norm_on_the_cpu():
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(small_model())
    expected = three_steps(small_model(), *batch())
    for key, value in three_steps(sync, *batch()).items():
        assert torch.equal(value, expected[key]), key
