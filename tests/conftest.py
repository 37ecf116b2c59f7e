"""Without a GPU the Triton kernels run in Triton's interpreter: the switch has to be set before Triton is imported.

Each worker takes its share of the cores.
"""

import os

import torch

torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

import resnet_fused  # noqa: E402
from resnet_fused.fetch import FetchError, fetch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; the same cases run in Triton's interpreter"))


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
