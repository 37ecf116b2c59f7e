"""A wrong kernel is caught, disabled and named, and the answer is eager's, whatever the files that remember it hold."""

import ctypes
import errno
import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton.runtime.errors import OutOfResources

import resnet_fused
from resnet_fused import ops, testing
from resnet_fused.backends import cudnn
from resnet_fused.dispatch import compare, numerics, plans, registry, store, trust
from resnet_fused.ops.batch_norm_act.calls import DxCall
from resnet_fused.ops.conv_bn_act import Call
from resnet_fused.testing import CASES, make_inputs

CASE = next(c for c in CASES if c.id == "bn-join")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    trust.forget()
    yield
    trust.forget()


@pytest.fixture
def planted(monkeypatch):
    """A kernel that forgets the residual; counts its launches."""
    calls = []

    def wrong(call, config):
        run = plan(call._replace(residual=None), config)

        def count(call):
            if not call.x.is_meta:  # only its class is asked for
                calls.append("triton")
            return run(call._replace(residual=None))

        return count

    triton = registry.implementation("triton", "batch_norm_act")
    plan = triton.plan
    monkeypatch.setattr(triton, "plan", wrong)
    return calls


def call():
    args, kwargs = make_inputs(CASE, dtype=torch.float32)
    with torch.no_grad():
        return ops.batch_norm_act(*args, **kwargs), testing.REFERENCES[CASE.op](*args, **kwargs)


def stored(tmp_path):
    (path,) = tmp_path.glob("verdicts-*.json")
    return path, json.loads(path.read_text())


def test_a_wrong_kernel_is_caught_once_and_named(planted, tmp_path):
    with pytest.warns(UserWarning, match="batch_norm_act_apply/triton/torch.float32.*is disabled.*off by .* budget"):
        y, expected = call()
    assert torch.equal(y, expected) and len(planted) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, expected = call()
    assert torch.equal(y, expected) and len(planted) == 1
    assert "off by" in next(iter(stored(tmp_path)[1]["entries"].values()))


def test_the_verdict_is_remembered(tmp_path, monkeypatch):
    call()
    assert list(stored(tmp_path)[1]["entries"].values()) == [""]
    trust.forget()
    monkeypatch.setattr(numerics, "wrong", lambda *args: pytest.fail("checked again"))
    call()


def test_a_forced_backend_raises_with_the_reason(planted):
    with resnet_fused.backend("triton"), pytest.warns(UserWarning), pytest.raises(resnet_fused.BackendUnavailable) as e:
        call()
    assert "batch_norm_act" in str(e.value) and "off by" in str(e.value)


@pytest.fixture
def launches_raise(monkeypatch):
    """Calls with it make every launch raise; how many were tried."""
    tried = []

    def raise_at_launch(error):
        def plan(call, config):
            def run(call):
                if call[0].is_meta:
                    return run_planned(call)
                tried.append(call)
                raise error

            run_planned = planned(call, config)
            return run

        monkeypatch.setattr(triton, "plan", plan)
        return tried

    triton = registry.implementation("triton", "batch_norm_act")
    planned = triton.plan
    return raise_at_launch


def test_a_kernel_that_does_not_fit_is_disabled_for_ever(launches_raise, tmp_path):
    tried = launches_raise(OutOfResources(300000, 232448, "shared memory"))
    with pytest.warns(UserWarning, match="disabled on this device: it raised OutOfResources: out of resource: shared"):
        y, expected = call()
    assert torch.equal(y, expected) and len(tried) == 1
    assert "shared memory" in next(iter(stored(tmp_path)[1]["entries"].values()))
    trust.forget()
    with pytest.warns(UserWarning, match="disabled on this device"):
        call()
    assert len(tried) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        OSError(errno.ENOSPC, "No space left on device"),
        subprocess.CalledProcessError(1, "gcc"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_that_says_nothing_about_the_kernel_is_not_kept_on_disk(error, launches_raise, tmp_path):
    tried = launches_raise(error)
    with pytest.warns(UserWarning, match="does not serve in this process: its check raised"):
        y, expected = call()
    assert torch.equal(y, expected) and len(tried) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert len(tried) == 1 and not list(tmp_path.glob("verdicts-*.json"))


def test_without_memory_for_a_check_eager_serves_until_there_is(launches_raise, tmp_path, monkeypatch):
    with monkeypatch.context():
        tried = launches_raise(torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.warns(UserWarning, match="there was no memory left to check it"):
            y, expected = call()
        assert torch.equal(y, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, expected = call()
        assert torch.equal(y, expected) and len(tried) == 2 and not list(tmp_path.glob("verdicts-*.json"))
        with resnet_fused.backend("triton"), pytest.raises(resnet_fused.BackendUnavailable, match="no memory left"):
            call()


def test_a_launch_that_fails_at_one_shape_leaves_the_call_to_the_next(monkeypatch):
    x = torch.randn(4, 8, 5, 5).contiguous(memory_format=torch.channels_last)

    def train():
        bn = [torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)]
        return ops.batch_norm_act(x, *bn), *bn[2:]

    def plan(call, config):
        run = planned(call, config)

        def fail(call):
            results = run(call)  # and has written the running statistics
            if call.x.shape[0] == 4 and not call.x.is_meta:
                raise RuntimeError("Triton Error [CUDA]: invalid argument")
            return results

        return fail

    with resnet_fused.backend("eager"):
        expected = train()
    triton = registry.implementation("triton", "batch_norm_act")
    planned = triton.plan
    monkeypatch.setattr(triton, "plan", plan)
    with pytest.warns(UserWarning, match="does not serve calls like this one: its launch raised RuntimeError: Triton"):
        found = train()
    for ours, theirs in zip([*found, *train()], [*expected, *expected], strict=True):
        torch.testing.assert_close(ours, theirs)
    with resnet_fused.backend("triton"), pytest.raises(RuntimeError, match="Triton Error"):
        train()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"environment": {}, "entries": {}}', '{"environment": null}', "\x00\x01"], ids=repr
)
def test_a_damaged_or_foreign_file_is_a_warning(tmp_path, content):
    call()
    path, good = stored(tmp_path)
    path.write_text(content)
    trust.forget()
    with pytest.warns(UserWarning, match="is left aside"):
        y, expected = call()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert stored(tmp_path)[1] == good


def test_another_versions_verdicts_do_not_count(tmp_path):
    call()
    path, content = stored(tmp_path)
    content["environment"]["torch"] = "1.0"
    content["entries"] = dict.fromkeys(content["entries"], "planted")
    path.write_text(json.dumps(content))
    trust.forget()
    with pytest.warns(UserWarning, match="it was written for .*'torch': '1.0'"):
        call()
    assert list(stored(tmp_path)[1]["entries"].values()) == [""]


def test_many_threads_and_devices_write_at_once(tmp_path, monkeypatch):
    """Two devices of one name share a file, as two processes do."""
    stores = [store.Store("verdicts", torch.device("cpu")) for _ in range(2)]
    monkeypatch.setattr(json, "dump", slow_dump)

    def write(i):
        stores[i % 2][f"kernel {i}"] = ""

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        list(pool.map(write, range(24)))
    expected = {f"kernel {i}" for i in range(24)}
    assert stored(tmp_path)[1]["entries"].keys() == expected
    assert store.Store("verdicts", torch.device("cpu")).entries.keys() == expected


def slow_dump(content, file, **options):
    """Lets another thread come between two entries, whatever the encoder does."""
    for _ in content["entries"]:
        time.sleep(0.001)
    file.write(json.dumps(content, **options))


def test_two_processes_lose_nothing(tmp_path):
    code = (
        "import sys, torch\n"
        "from resnet_fused.dispatch import store\n"
        "store.cache_dir = lambda: store.Path(sys.argv[1])\n"
        "own = store.Store('times', torch.device('cpu'))\n"
        "for i in range(20): own[f'{sys.argv[2]} {i}'] = i"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [p.wait() for p in processes] == [0, 0]
    assert len(store.Store("times", torch.device("cpu")).entries) == 40


@pytest.mark.parametrize("what", ["torch", "cudnn", "driver", "device"])
def test_environments_have_files_of_their_own(monkeypatch, what):
    environment = store.environment(torch.device("cpu"))
    for version in ("1", "2"):
        monkeypatch.setattr(store, "environment", lambda device, v=version: environment | {what: v})
        store.Store("verdicts", torch.device("cpu"))["kernel"] = f"off by {version}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("1", "2"):  # neither has put the other out
            monkeypatch.setattr(store, "environment", lambda device, v=version: environment | {what: v})
            assert store.Store("verdicts", torch.device("cpu")).entries == {"kernel": f"off by {version}"}


def test_a_cuda_device_is_known_by_its_name_and_its_drivers_version(monkeypatch):
    def version(found):
        found._obj.value = 13020
        return 0

    driver = type("Driver", (), {"cuDriverGetVersion": staticmethod(version)})
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = store.environment(torch.device("cuda", 0))
    assert found["device"] == "NVIDIA H100 (compute capability 9.0)" and found["driver"] == "13020"
    assert found["cudnn"] == "91900"


def test_an_unwritable_folder_is_a_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(store, "cache_dir", lambda: blocked)
    with pytest.warns(UserWarning, match="can't be written"):
        y, expected = call()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    own = store.Store("verdicts", torch.device("cpu"))
    with pytest.warns(UserWarning, match="can't be written") as told:
        own["a"], own["b"] = "", ""
    assert len(told) == 1 and own.entries == {"a": "", "b": ""}


def test_an_unchecked_kernel_inside_a_capture_gives_eagers_result(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(trust, "_on_gpu", lambda device: True)
    with pytest.warns(UserWarning, match="run the model once before capture"):
        y, expected = call()
    assert torch.equal(y, expected)


@pytest.fixture
def conv_launches(monkeypatch):
    """The backends that convolutions are launched on; cuDNN is there, and checked like Triton."""
    launched = []

    def launching(backend):
        def launch(call):
            if not call.x.is_meta:  # only its class is asked for
                launched.append(backend)
            return call.reference()

        return lambda call, config: launch

    for backend in ("cudnn", "triton"):
        monkeypatch.setattr(registry.implementation(backend, "conv_bn_act"), "plan", launching(backend))
    plans.forget()
    monkeypatch.setitem(registry._UNAVAILABLE, "cudnn", lambda *device: None)
    return launched


def call_conv(width=4):
    with torch.no_grad():
        ops.conv_bn_act(torch.randn(1, 8, 4, width), torch.randn(8, 8, 1, 1), *[torch.ones(8)] * 4)


def test_what_a_capture_chose_is_not_kept(conv_launches, monkeypatch):
    with resnet_fused.backend("cudnn"):
        call_conv()  # checked, as Triton is not
    with monkeypatch.context() as capture, pytest.warns(UserWarning, match="run the model once before capture"):
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capture.setattr(trust, "_on_gpu", lambda device: True)
        call_conv()
    call_conv()
    assert conv_launches == ["cudnn", "cudnn", "cudnn", "triton", "triton"]  # the check and the call; captured; again


def test_choices_are_kept_for_few_calls_and_for_one_setting_of_cudnn(conv_launches, monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 3)
    for width in range(1, 6):
        call_conv(width)
    assert 0 < len(plans.kept) <= 3
    plans.forget()
    for enabled in (True, False, True):
        with torch.backends.cudnn.flags(enabled=enabled):
            call_conv()
    assert len(plans.kept) == 2


def test_cudnn_is_refused_where_determinism_is_asked_for(conv_launches, monkeypatch):
    monkeypatch.setitem(registry._UNAVAILABLE, "cudnn", lambda *device: cudnn.unavailable("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cudnn.triton, "unavailable", lambda *device: None)
    images = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)

    def launched():
        with torch.no_grad():
            ops.conv_bn_act(*images, *[torch.ones(8)] * 4, padding=1)
        return conv_launches[-1]

    for _ in range(2):
        assert launched() == "cudnn"
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert launched() == "triton"
        assert launched() == "triton"
    assert launched() == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        assert launched() == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched() == "cudnn"


@pytest.fixture
def engine(monkeypatch):
    """cuDNN's fused call stands for itself on the CPU, with a pool of blocks that its result is allocated from."""
    pool = {}

    def full_like(t, value):
        block = torch.empty_like(t).fill_(value)
        pool[block.numel()] = block
        return block

    monkeypatch.setattr(numerics.torch, "full_like", full_like)

    def install(finish):
        def fused(x, weight, bias, *args):
            y = torch.nn.functional.conv2d(x, weight, bias, *args)
            return finish(y, pool.get(y.numel(), torch.zeros_like(y)))

        monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
        x, weight = torch.randn(1, 8, 5, 5), torch.randn(16, 8, 3, 3)
        bn = [v + 1 for v in torch.rand(4, 16)]
        call = Call(x, weight, None, *bn, 1e-5, [1, 1], [1, 1], [1, 1], 1, None, True)
        return compare("cudnn", call, None)

    return install


def test_an_engine_that_reads_its_uninitialised_result_is_out(engine):
    assert engine(lambda y, z: torch.relu(y)) is None
    assert "has a NaN" in engine(lambda y, z: torch.relu(y + 0 * z))


def test_an_engine_that_drops_nan_is_out(engine):
    assert "lacks a NaN" in engine(lambda y, z: torch.fmax(y, torch.zeros_like(y)))


def conv_call(x, weight, **changes):
    call = Call(x, weight, None, *[torch.ones(weight.shape[0])] * 4, 1e-5, [2, 2], [1, 1], [1, 1], 1, None, True)
    return call._replace(**changes)


def test_a_check_computes_on_a_crop_that_compiles_the_same():
    x = torch.zeros(1).half().expand(64, 20, 120, 200)
    residual = x.new_zeros(1).expand(64, 8, 60, 100).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(161 * 8, dtype=torch.float16)[1 : 1 + 8 * 20].view(8, 20, 1, 1)  # misaligned
    call = conv_call(x[:, :, :, ::2].contiguous(), weight, padding=[0, 0], residual=residual[:, :, :, :50])
    drawn = call.drawn()
    assert drawn.x.shape == (2, 20, 40, 36) and drawn.x.is_contiguous() and drawn.residual.shape == (2, 8, 20, 18)
    assert drawn.residual.stride() == call.residual.stride() and drawn.weight.data_ptr() % 16 == 2
    assert drawn.weight.stride() == weight.stride() and int(drawn.x.isnan().sum()) == 1
    whole = call.drawn(whole=True)
    assert [t.shape for t in whole[:2]] == [t.shape for t in call[:2]] and whole.x.stride() == call.x.stride()


def test_a_check_leaves_room_for_a_large_kernel():
    call = conv_call(torch.zeros(1, 4, 128, 70), torch.zeros(4, 4, 7, 3), dilation=[9, 1])
    assert call.drawn().x.shape == (2, 4, 64, 38)


def test_where_the_crop_compiles_something_else_the_whole_is_checked(monkeypatch):
    triton, sizes = registry.implementation("triton", "conv_bn_act"), []
    planned = triton.plan

    def plan(call, config):
        sizes.append(call.x.shape[2:])
        return planned(call, config)

    monkeypatch.setattr(triton, "plan", plan)
    monkeypatch.setattr(triton, "kernel_class", lambda call, config: str(call.x.shape[3] > 40))
    call = conv_call(torch.zeros(1, 4, 33, 65), torch.zeros(4, 4, 3, 3))
    assert compare("triton", call, triton.configs(call)[0]) is None and sizes == [(33, 65)]


def test_the_check_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    call()
    torch.manual_seed(3)
    args, kwargs = make_inputs(CASE, dtype=torch.float32, seed=9)
    with torch.no_grad():
        ops.batch_norm_act(*args, **kwargs)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_gradient_without_its_mean_is_caught(dtype, monkeypatch):
    """dx + s * mean(dz): small beside dx, and a rounding in float16 where the sums are small."""

    def without_mean(call, config):
        run = plan(call, config)
        return lambda call: run(call._replace(sum_dz=torch.zeros_like(call.sum_dz)))

    triton = registry.implementation("triton", "batch_norm_act")
    plan = triton.plan
    x = torch.randn(2, 64, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)
    v = torch.ones(64)
    call = DxCall(x, x, v, v, v, v, 1e-5, *[None] * 6, True, v, v, None, None, None, True, False)
    assert compare("triton", call, None) is None
    monkeypatch.setattr(triton, "plan", without_mean)
    assert "result 0 is off by" in compare("triton", call, None)
