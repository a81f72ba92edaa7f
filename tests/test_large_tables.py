"""Tables above a size lie in files of their own, which all who score map: exported, checked, refused, gone on from, shared, let go of."""

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import pytest
import small
import torch
from onnx import TensorProto, helper
from onnxscript import ir

from features import bundle as bundles
from features import files
from features.bundle import EXPLAIN_MODEL, GOLDENS, INT8_MODEL, MANIFEST, MODEL, SCHEMA, VOCABULARIES, BundleError, load_bundle, publish
from features.graph_file import graph_facts
from service.errors import ScoringError
from service.models.loaded import load_model
from service.ranking.scorer import ExplainGraph, Scorer
from service.settings import Settings
from training import tables
from training.calibrate import Calibration
from training.datasets.prepared import Prepared
from training.export import export
from training.export.explain import explained
from training.export.export import FEW, ServedNetwork, evaluate_bundle, random_feeds, to_onnx, verify
from training.export.onnx import OnnxFile, laid_beside
from training.train import Trained
from training.weights import start_of

SIZES = {name: v.size for name, v in small.vocabularies().categories.items()}
SHARED_MB = 64


@pytest.fixture(scope="module", autouse=True)
def a_few_numbers_are_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tables, "LARGE", 256)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Trained, Path]:
    folder = tmp_path_factory.mktemp("large")
    (folder / "data").mkdir()
    data = small.data_set(folder / "data")
    trained = small.quick(data, "deepfm", epochs=1, int8=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "SIZES", (1, 7))
        patched.setattr(export, "to_onnx", lambda *given, **more: traced(small.traced(*given, **more)))
        patched.setattr("training.export.explain.request_graph", lambda *given: traced(small.traced_request(*given)))
        patched.setattr(export, "refusal", lambda _: None)  # a hundred rows say nothing of int8
        return data, trained, export.export(data, trained, folder / "models", "m", small.quiet())


def traced(graph: bytes) -> OnnxFile:
    """As torch's exporter, which takes thirty times as long, lays it out."""
    model = ir.serde.deserialize_model(onnx.load_from_string(graph))
    large = laid_beside(model.graph.initializers)
    return OnnxFile(ir.serde.serialize_model(model).SerializeToString(), large)


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("table-*.bin"))


def test_a_table_lies_in_the_bundle_once(made: tuple[Prepared, Trained, Path]) -> None:
    _, trained, path = made
    state = trained.network.state_dict()
    first, second = state["first.table.weight"].numpy(), state["second.table.weight"].numpy()
    held = {file: np.fromfile(path / file, np.float32) for file in files_of(path)}
    assert sorted(map(len, held.values())) == [first.size, second.size]
    assert all(any(np.array_equal(each, table.ravel()) for each in held.values()) for table in (first, second))
    assert load_bundle(path).files > set(held)
    for graph in (MODEL, INT8_MODEL, EXPLAIN_MODEL):
        assert graph_facts((path / graph).read_bytes()).external == set(held)
    with np.load(path / "weights.npz", allow_pickle=False) as weights:
        assert {str(weights[f"{name}.table.weight"]) for name in ("first", "second")} == set(held)
    assert not list(path.glob("*/*"))


def test_the_service_and_the_evaluation_score_as_torch_does(made: tuple[Prepared, Trained, Path]) -> None:
    data, trained, path = made
    bundle, served = load_bundle(path), ServedNetwork(trained.network, trained.calibration, trained.encoder.schema).eval()
    for graph in (MODEL, INT8_MODEL):
        bundle.check_goldens(Scorer(path / graph, "cpu", 1).score, graph)
    for shape in FEW:
        feeds = random_feeds(trained.encoder.schema, SIZES, *shape)
        assert np.abs(Scorer(path / MODEL, "cpu", 1).score(feeds) - export.score(served, feeds)).max() < export.TOLERANCE
        whole = ExplainGraph(path / EXPLAIN_MODEL).run(feeds)
        assert all(
            np.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(whole.values(), explained(trained.network, feeds), strict=True)
        )
    assert evaluate_bundle(bundle, data, "test", small.quiet()).auc == pytest.approx(trained.metrics["test"].auc, abs=1e-6)


def test_a_training_goes_on_from_the_same_weights(made: tuple[Prepared, Trained, Path], tmp_path: Path) -> None:
    _, trained, path = made
    bundle, state = load_bundle(path), trained.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start_of(bundle).network.state_dict().items())
    for file in files_of(path):
        without = {name: digest for name, digest in bundle.manifest["files"].items() if name != file}
        with pytest.raises(BundleError, match=rf"there is no file '{file}'; use --start scratch"):
            start_of(replace(bundle, manifest={**bundle.manifest, "files": without}))


def test_a_table_is_not_copied_to_be_exported() -> None:
    served = ServedNetwork(small.network("lr"), Calibration(), small.schema()).eval()
    graph = to_onnx(served)
    ((_, table),) = graph.tables.values()
    assert any(np.shares_memory(table, weights.numpy()) for weights in served.state_dict().values())
    assert verify(graph, served, SIZES) < 5e-6


def cut(path: Path, file: str, other: str) -> None:
    (path / file).write_bytes((path / file).read_bytes()[:-4])


def altered(path: Path, file: str, other: str) -> None:
    data = bytearray((path / file).read_bytes())
    data[17] ^= 1
    (path / file).write_bytes(data)


def swapped(path: Path, file: str, other: str) -> None:
    (path / file).rename(path / "aside")
    (path / other).rename(path / file)
    (path / "aside").rename(path / other)


def linked(path: Path, file: str, other: str) -> None:
    (path / file).rename(path.parent / "elsewhere")
    (path / file).symlink_to(path.parent / "elsewhere")


def renamed(name: str) -> Callable[[Path, str, str], None]:
    """The graph names a file that is there, and not in the bundle; its own digest is right."""

    def rename(path: Path, file: str, _: str) -> None:
        graph = (path / MODEL).read_bytes()
        model = onnx.load_from_string(graph)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = name if entry.value == file else entry.value
        republish(path, {MODEL: model.SerializeToString()})

    return rename


def republish(path: Path, changed: dict[str, bytes]) -> None:
    made = publish(path.parent, "other", {**{file: (path / file).read_bytes() for file in load_bundle(path).files}, **changed}, {})
    for file in (*changed, MANIFEST):
        (made / file).replace(path / file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path, file, _: (path / file).unlink(), "cannot be read: .* No such file"),
        (cut, "table-.* is not what was published"),
        (altered, "table-.* is not what was published"),
        (swapped, "table-.* is not what was published"),
        (linked, "has weights in table-.*, which is a link to a file outside of the bundle; put the file itself there"),
        (renamed("../elsewhere.bin"), "has weights in ../elsewhere.bin, which no digest"),
        (renamed("/etc/passwd"), "has weights in /etc/passwd, which no digest"),
        (renamed(MANIFEST), "has weights in manifest.json, which no digest"),
    ],
)
def test_what_is_not_the_bundle_s_own_table_is_refused(
    made: tuple[Prepared, Trained, Path], tmp_path: Path, harm: Callable[[Path, str, str], None], message: str
) -> None:
    path = tmp_path / "m" / "7"
    path.mkdir(parents=True)
    for file in made[2].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    load_bundle(path)
    harm(path, *files_of(path))
    with pytest.raises(BundleError, match=message):
        load_bundle(path)


def test_a_graph_that_takes_more_than_its_table_has_is_refused(made: tuple[Prepared, Trained, Path], tmp_path: Path) -> None:
    model = onnx.load(made[2] / MODEL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(int(entry.value) * 8) if entry.key == "length" else entry.value
    for file in files_of(made[2]):
        (tmp_path / file).write_bytes((made[2] / file).read_bytes())
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ScoringError, match=r"model\.onnx cannot be loaded"):
        Scorer(tmp_path / MODEL, "cpu", 1)


def test_a_table_that_no_bundle_may_hold_is_not_published(
    made: tuple[Prepared, Trained, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "MOST_BYTES", 1000)
    contents = {SCHEMA: b"", VOCABULARIES: b"", GOLDENS: b"", "table-1.bin": np.zeros((126, 2), np.float32).data}
    with pytest.raises(BundleError, match=r"table-1\.bin has 1,008 bytes, and a bundle's file at most 1,000; nothing was published"):
        publish(tmp_path, "m", contents, {})
    assert not [each for each in (tmp_path / "m").iterdir() if each.name != bundles.LOCK]


def mapped(path: Path) -> set[str]:
    return {line.rpartition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines() if f"{path}/table-" in line}


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_version_that_is_let_go_of_is_mapped_no_more(made: tuple[Prepared, Trained, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as beside:
        model = load_model(made[2], Settings(models=made[2].parent.parent), beside)
        assert len(mapped(made[2])) == 2
        del model
    gc.collect()
    assert not mapped(made[2])


MAPS = """
import json, sys
from pathlib import Path
import numpy as np
from service.ranking.scorer import Scorer
scorer, rows = Scorer(Path(sys.argv[1]), "cpu", 1), int(sys.argv[2])
for some in np.array_split(np.arange(rows), 64):
    scorer.run({"ad_ids": some[None, :, None]})
print("read", flush=True)
sys.stdin.readline()
lines = Path("/proc/self/smaps").read_text().splitlines()
at = next(i for i, line in enumerate(lines) if line.endswith("table.bin"))
found = dict(line.split(":") for line in lines[at + 1 : at + 20])
print(json.dumps({name: int(found[name].split()[0]) for name in ("Rss", "Pss", "Private_Dirty")}), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_processes_share_a_table(tmp_path: Path) -> None:
    rows = SHARED_MB * 2**20 // 4
    np.ones((rows, 1), np.float32).tofile(tmp_path / "table.bin")
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, 1], data_location=TensorProto.EXTERNAL)
    table.external_data.add(key="location", value="table.bin")
    nodes = [
        helper.make_node("Gather", ["table", "ad_ids"], ["found"]),
        helper.make_node("ReduceSum", ["found", "axes"], ["p_click"], keepdims=0),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    given, got = (helper.make_tensor_value_info(*each) for each in (("ad_ids", 7, ["R", "C", 1]), ("p_click", 1, ["R", "C"])))
    graph = helper.make_graph(nodes, "g", [given], [got], [table, axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx")
    command = [sys.executable, "-c", MAPS, tmp_path / "model.onnx", str(rows)]
    two = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = []
    try:
        for _ in range(2):  # both have read all of it before either looks
            lines = [each.stdout.readline() for each in two]  # type: ignore[union-attr]
            for each in two if lines[0] == "read\n" else ():
                each.stdin.write("\n")  # type: ignore[union-attr]
                each.stdin.flush()  # type: ignore[union-attr]
        found = [json.loads(line) for line in lines]
    finally:
        for each in two:
            each.communicate()
    assert all(each["Rss"] == SHARED_MB * 1024 for each in found), found
    assert sum(each["Pss"] for each in found) == pytest.approx(SHARED_MB * 1024, rel=0.05)
    assert not any(each["Private_Dirty"] for each in found)


def test_processes_that_share_notes_read_a_large_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, notes, read = tmp_path / "table.bin", tmp_path / "notes", list[str]()
    actual = files._digest

    def counted(opened: IO[bytes]) -> str:
        read.append(file.name)
        return actual(opened)

    def digest(counts: int, notes: Path | None = notes) -> None:
        assert files.digest(file, 2**30, notes) == hashlib.sha256(file.read_bytes()).hexdigest()
        assert len(read) == counts

    monkeypatch.setattr(files, "NOTED", 4)
    monkeypatch.setattr(files, "_digest", counted)
    file.write_bytes(b"12345")
    digest(1)  # there is no such folder, so no note
    notes.mkdir()
    for _ in range(3):
        digest(2)
    digest(3, None)
    seen = file.stat()
    file.write_bytes(b"12346")
    while file.stat().st_ctime_ns == seen.st_ctime_ns:  # a tick of the clock
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # it looks as it did, but for a time that cannot be set
    digest(4)
    (tmp_path / "other").write_bytes(b"54321")
    (tmp_path / "other").replace(file)
    digest(5)
    for note in notes.iterdir():
        note.write_text("torn")
    digest(6)
    digest(6)
    file.write_bytes(b"123")  # not large
    digest(7)
    digest(8)
