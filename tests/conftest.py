"""Which device the tests have: a GPU, the virtual one (`--virtual-gpu=90`), or none, where Triton's interpreter serves.

The switches have to be set before torch and Triton are imported. Each worker takes its share of the cores.
"""

import contextlib
import dataclasses
import os
import sys
import zlib

import pytest

VIRTUAL = next((a.partition("=")[2] for a in sys.argv if a.startswith("--virtual-gpu=")), None)
VIRTUAL = VIRTUAL or os.environ.get("PYTEST_VIRTUAL_GPU")
if VIRTUAL:
    os.environ["PYTEST_VIRTUAL_GPU"] = VIRTUAL  # for the workers
    import virtual_gpu

    virtual_gpu.install(int(VIRTUAL))

os.environ.setdefault("RESNET_FUSED_CALIBRATE", "off")  # one choice everywhere; test_speed turns it on

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples everywhere, others by --hypothesis-profile=default: the budget is twice PyTorch's own error on the
# same tensors, and who draws long enough finds some on which it made hardly any.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import interpreter_builder

        # half of its time goes into overflow checks that say nothing without debug=True
        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)

import resnet_fused  # noqa: E402
from resnet_fused.fetch import FetchError, fetch  # noqa: E402

MARKS = {
    "gpu": (HAS_GPU, "needs a CUDA device; it runs on the virtual one: --virtual-gpu=90"),
    "real_gpu": (HAS_GPU and not VIRTUAL, "needs a real GPU: too much to emulate, or not emulated"),
    "virtual_gpu": (bool(VIRTUAL), "tests the virtual GPU: --virtual-gpu=90"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("virtual GPU")
    group.addoption(
        "--virtual-gpu", metavar="CAPABILITY", help="run the tests marked gpu there: 80, 86, 89, 90, 100, 120"
    )
    group.addoption(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="of every test's parameters the first, and one in N of the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (asked := config.getoption("--virtual-gpu")) and asked != VIRTUAL:
        raise pytest.UsageError(f"--virtual-gpu={asked} has to be given so, on the command line, and once")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, seen = config.getoption("share"), set()
    kept, dropped = [], []
    for item in items:
        drawn = item.function not in seen or zlib.crc32(item.nodeid.encode()) % share == 0
        seen.add(item.function)
        on_device = not VIRTUAL or any(map(item.get_closest_marker, ("gpu", "any_device", "virtual_gpu")))
        (kept if on_device and drawn else dropped).append(item)
        for name, (met, reason) in MARKS.items():
            if item.get_closest_marker(name) and not met:
                item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Where there is a GPU the kernels are compiled: a test that hands them CPU tensors has nothing to run them."""
    try:
        return (yield)
    except Exception as error:
        on_device = any(map(item.get_closest_marker, ("gpu", "any_device", "virtual_gpu")))
        if not HAS_GPU or on_device or not any(text in str(error) for text in ("TRITON_INTERPRET=1", "(cpu tensor?)")):
            raise
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1), which a machine with a GPU leaves off")


@pytest.fixture(autouse=True, scope="session")
def _verdicts_of_this_session(tmp_path_factory):
    """Kernels are checked anew, and the user's own verdicts stay as they are."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_fused.dispatch.store, "cache_dir", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _restore_backend():
    yield
    resnet_fused.set_backend("auto")


@pytest.fixture(scope="session")
def msra():
    """The folder of the paper's own weights."""
    try:
        return fetch("resnet50-msra")
    except (FetchError, OSError) as error:
        pytest.skip(f"the MSRA weights are not in the cache and can't be fetched: {error}")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
