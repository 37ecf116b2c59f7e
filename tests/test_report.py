"""The page of results: what is on it, that it stands alone, and how a browser shows it."""

import json
import shutil
import struct
import subprocess

import pytest
import torch

from resnet_fused import bench, cli
from resnet_fused.report.compare import compared
from resnet_fused.report.load import load

html5lib = pytest.importorskip("html5lib")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
CONDITIONS = bench.conditions(torch.device("cpu")) | {"device": "CPU <of a test>", "commit": "0123456789ab"}


def inference(batch, speeds, spread=0.01):
    """img/s by variant."""
    results = []
    for name, speed in speeds.items():
        ms = batch * 1e3 / speed
        samples = [ms * (1 - spread / 2), ms * (1 - spread / 2), ms, ms * (1 + spread / 2), ms * (1 + spread / 2)]
        results.append(bench.Result(name, "nhwc", error=0.0, limit=1.0, samples_ms=samples, peak_mib=10.0 * batch))
    results.append(bench.Result("onnxruntime", "nhwc", status="refused", reason="error 1", error=1.0, limit=0.1))
    for result in results:
        result.ratios = bench.paired_ratios(results[0].samples_ms, result.samples_ms)
    return bench.Report("resnet50", batch, 224, "float32", "cpu", results[0].variant, CONDITIONS, results).to_dict()


def traffic():
    rows = [
        {"pass": p, "variant": v, "launches": 9, "read": r, "written": r // 2, "saved": r, "peak": r, "operators": {}}
        for p, v, r in [("forward", "torchvision-nhwc", 10**9), ("forward", "resnet_fused", 4 * 10**8)]
    ]
    head = {"model": "resnet50", "batch": 8, "dtype": "float16", "image_size": 224, "conditions": CONDITIONS}
    return [{"task": task, **head, "rows": rows} for task in ("traffic", "memory")]


def ops(microseconds):
    figures = {"microseconds": microseconds, "spread": 0.01, "gb_per_s": 500.0, "ratio_to_eager": 1.5}
    rows = [{"case": "conv-1x1", "dtype": "float16", "backends": {"cuda": {"status": "ok"} | figures}}]
    ceilings = {"ceilings": {"float16": {"bytes_per_s": 1e12, "flops_per_s": 1e14}}}
    return {"task": "ops", "dtypes": ["float16"], "conditions": CONDITIONS | ceilings, "rows": rows}


def parity():
    errors = {"max": 1e-6, "mean": 1e-7}
    wrong = {"status": "refused", "reason": "off", "max": 0.5, "mean": 0.5}
    row = {"name": "conv-1x1", "dtype": "float16", "pytorch": errors, "backends": {"cuda": wrong}}
    return {"task": "parity", "dtypes": ["float16"], "conditions": CONDITIONS, "rows": [row]}


def roofline():
    call = {"op": "conv_bn_act", "shape": "256x64x56x56 64x64x3x3", "layers": 3, "best": "cuda"}
    call |= {"microseconds": {"cuda": 30.0}, "floor_microseconds": 15.0, "share_of_floor": 0.5}
    head = {"task": "roofline", "model": "resnet50", "batch": 256, "dtype": "float16", "conditions": CONDITIONS}
    return [head | {"calls": [call]}]


@pytest.fixture
def made(tmp_path, capsys):
    """The folder, the exit status and what was printed."""
    speeds = {"torchvision-nhwc": 100.0, "resnet_fused": 150.0, "resnet_fused+deploy": 200.0}
    files = {"new.json": [inference(1, speeds), inference(8, speeds)], "ops.json": ops(10.0), "parity.json": parity()}
    files |= {"roof.json": roofline(), "ledger.json": traffic()}
    for name, content in files.items():
        bench.write_json(tmp_path / name, content)
    bench.write_json(tmp_path / "old.json", inference(8, speeds | {"resnet_fused": 200.0}))
    results = [str(tmp_path / name) for name in files]
    status = cli.main(["report", *results, "-o", str(tmp_path / "out"), "--compare", str(tmp_path / "old.json")])
    return tmp_path / "out", status, capsys.readouterr().out


def test_the_page_has_every_figure_and_its_conditions_and_refers_to_nothing(made):
    folder, status, printed = made
    assert status == 1 and "slower: resnet50 inference, batch 8, float32: resnet_fused: -25.0%" in printed
    text = (folder / "index.html").read_text()
    page = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    figures = page.findall(".//figure")
    kinds = ["throughput", "ladder", "ladder", "layers", "memory", "ops", "resnet50-traffic", "resnet50-memory"]
    assert all(figure.get("id").startswith(kind) for figure, kind in zip(figures, kinds, strict=True))
    for figure in figures:
        caption = "".join(figure.find("figcaption").itertext())
        assert "commit 0123456789ab" in caption and f"torch {torch.__version__}" in caption
        assert figure.find(".//{*}svg") is not None
        name = figure.get("id")
        assert (folder / f"{name}.svg").read_text().startswith("<svg")
        assert struct.unpack(">II", (folder / f"{name}.png").read_bytes()[16:24])[0] > 800
    for element in page.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object")
        for key, value in element.attrib.items():
            assert not (str(key).endswith(("href", "src")) and not value.startswith("#")), (key, value)
    assert "@import" not in text and "url(http" not in text and "<of a test>" not in text
    assert "onnxruntime refused" in text
    [worse] = page.findall(".//tr[@class='slower']")[:1]
    assert "resnet_fused" in "".join(worse.itertext())


def test_a_change_within_the_spread_is_none(tmp_path):
    before, after, noisy = (tmp_path / f"{name}.json" for name in ("before", "after", "noisy"))
    bench.write_json(before, inference(8, {"torchvision-nhwc": 100.0, "resnet_fused": 100.0}))
    bench.write_json(after, inference(8, {"torchvision-nhwc": 96.0, "resnet_fused": 120.0}))
    bench.write_json(noisy, inference(8, {"torchvision-nhwc": 80.0, "resnet_fused": 120.0}, spread=0.4))
    verdicts = [[c.verdict for c in compared(load([before]), load([path]))] for path in (after, noisy)]
    assert verdicts == [["same", "faster"], ["same", "same"]]


def test_one_figure_of_one_result_and_a_file_that_is_not_there(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(inference(8, {"torchvision-nhwc": 100.0, "resnet_fused": 120.0})))
    assert cli.main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("index.html: 1 figure of 1 result\n")
    assert cli.main(["report", "nosuch.json", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "resnet-fused: error: nosuch.json: No such file or directory\n"


@pytest.mark.parametrize(
    ("content", "words"), [("{", "no JSON"), ("[1]", "holds no results"), ('{"task": "x"}', "parity")]
)
def test_what_is_no_result_is_told_before_anything_is_written(tmp_path, capsys, content, words):
    (tmp_path / "a.json").write_text(content)
    assert cli.main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert words in line and str(tmp_path / "a.json") in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it(made, tmp_path, width):
    """The page is no wider than the window, and every figure is seen."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    script = (
        "<script>addEventListener('load', () => document.body.setAttribute('data-seen', JSON.stringify({"
        "wide: document.documentElement.scrollWidth - innerWidth, "
        "figures: [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
        "})))</script></body>"
    )
    shown = tmp_path / "shown.html"
    shown.write_text((made[0] / "index.html").read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--dump-dom"]
    command = [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", shown.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "data-seen" in dom, dom[-500:]
    seen = json.loads(html5lib.parse(dom, namespaceHTMLElements=False).find("body").get("data-seen"))
    assert seen["wide"] <= 0 and len(seen["figures"]) == 8 and min(seen["figures"]) > 250, seen
