"""Without a GPU the Triton kernels run in Triton's interpreter: the switch has to be set before Triton is imported."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

import resnet_fused  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; the same cases run in Triton's interpreter"))


@pytest.fixture(autouse=True, scope="session")
def _verdicts_of_this_session(tmp_path_factory):
    """Kernels are checked anew, and the user's own verdicts stay as they are."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_fused._store, "cache_dir", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _restore_backend():
    yield
    resnet_fused.set_backend("auto")
